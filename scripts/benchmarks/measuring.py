"""Fair timing: every contestant once in every round, ratios within a round, quartiles over rounds.

Machines get faster and slower while a benchmark runs (clocks, other processes). Contestants that
take turns see the same machine, so the ratio of two times of one round means something even where
the times themselves do not.
"""

import ctypes
import gc
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# Seconds a call: below this a working set may fit into caches, and is brought back there before
# each call that is timed warm.
WARMED_BELOW = 0.02
LEAST_ROUNDS, MOST_ROUNDS = 5, 100
TOO_SLOW = 30.0  # seconds a call; such a contestant is timed once and shown as too slow
WARM_UPS = {"cpu": 1, "cuda": 5}  # calls between the first, which compiles, and the rounds
FLUSHED_BYTES = 256 << 20  # several times the L2 cache of any GPU so far
HEAD_START_CYCLES = 1_000_000  # about half a millisecond: time to queue a contestant's kernels


class Missing(Exception):  # noqa: N818 - it is an answer, not an error
    """A contestant cannot run here; the message says why, and is shown in its row."""


def _nothing() -> None:
    """Do nothing: most contestants need no preparation in a round."""


@dataclass(frozen=True)
class Prepared:
    """A contestant made ready for one case.

    Attributes:
        timed: What is measured.
        before: Run before it in every round, not measured.
    """

    timed: Callable[[], Any]
    before: Callable[[], Any] = _nothing


@dataclass(frozen=True)
class Contestant:
    """Somebody's way of doing what a benchmark measures.

    Attributes:
        name: Shown in the table.
        prepare: Makes it ready for a case (whatever the benchmark's cases are) or raises
            :class:`Missing`.
    """

    name: str
    prepare: Callable[[Any], Prepared]


@dataclass
class Outcome:
    """What one contestant did in one case.

    Attributes:
        name: The contestant's.
        missing: Why it did not run; None if it did.
        seconds: One time for each round.
        first_call: Seconds of the first call, compilation included.
        second_call: Seconds of the next, without it.
        peak_bytes: Most memory in use during a call beyond what was before; None if not known.
        launch: Median seconds until a call returned on the host, on a GPU; else None.
    """

    name: str
    missing: str | None = None
    seconds: list[float] = field(default_factory=list)
    first_call: float | None = None
    second_call: float | None = None
    peak_bytes: int | None = None
    launch: float | None = None


class Clock:
    """Times one call on a device.

    On CUDA by events, so that the time is the GPU's: it is kept busy for a moment first, while the
    host queues the contestant's kernels.

    Args:
        device: Where the contestants compute.
        cold: On CUDA, overwrite the L2 cache before each call.
    """

    def __init__(self, device: torch.device, cold: bool = False):
        self.device, self.on_cuda, self.cold = device, device.type == "cuda", cold
        self._flushed = None
        if self.on_cuda and cold:
            self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def time(self, prepared: Prepared) -> tuple[float, float]:
        """Run once; return its seconds and the seconds until the call returned on the host."""
        prepared.before()
        if not self.on_cuda:
            start = time.perf_counter()
            prepared.timed()
            return (elapsed := time.perf_counter() - start), elapsed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        if self._flushed is not None:
            self._flushed.zero_()
        torch.cuda._sleep(HEAD_START_CYCLES)
        begin.record()
        start = time.perf_counter()
        prepared.timed()
        launch = time.perf_counter() - start
        end.record()
        self.synchronize()
        return begin.elapsed_time(end) / 1e3, launch

    def wall_time(self, prepared: Prepared) -> float:
        """Run once; return the seconds on the host until the device was done."""
        prepared.before()
        self.synchronize()
        start = time.perf_counter()
        prepared.timed()
        self.synchronize()
        return time.perf_counter() - start

    def peak_bytes(self, prepared: Prepared) -> int | None:
        """Run once; return the most memory it held beyond what was held before."""
        prepared.before()
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            prepared.timed()
            self.synchronize()
            return torch.cuda.max_memory_allocated(self.device) - before
        return _peak_resident_bytes(prepared.timed)


def compete(
    contestants: Sequence[Contestant],
    case: Any,
    clock: Clock,
    *,
    seconds: float,
    most_rounds: int = MOST_ROUNDS,
    measure_memory: bool = True,
) -> list[Outcome]:
    """Time the contestants in turns.

    Args:
        contestants: The first is the one that ratios are taken to.
        case: Passed to each ``prepare``.
        clock: Of the device.
        seconds: Of calls of each contestant; one that has had them sits out the later rounds, after
            the fifth at the earliest.
        most_rounds: Even if there is time left.
        measure_memory: Whether to spend a call of each on its peak memory.
    """
    entries = []
    if clock.on_cuda:
        torch.cuda.empty_cache()  # what the case before left would be in the way of a large one
    for contestant in contestants:
        outcome = Outcome(contestant.name)
        prepared = _make_ready(contestant, case, clock, outcome, measure_memory)
        entries.append((outcome, prepared))
    running = [entry for entry in entries if entry[1] is not None]
    launches: dict[str, list[float]] = {outcome.name: [] for outcome, _ in running}
    collecting = gc.isenabled()
    gc.disable()
    try:
        order = random.Random(0)  # nobody always runs after the same neighbour
        playing = list(running)
        for played in range(most_rounds):
            if played >= LEAST_ROUNDS:
                playing = [entry for entry in playing if sum(entry[0].seconds) < seconds]
            order.shuffle(playing)
            for outcome, prepared in playing:
                if not clock.cold and outcome.second_call < WARMED_BELOW:
                    clock.wall_time(prepared)  # the neighbours left their data in the caches
                taken, launch = clock.time(prepared)
                outcome.seconds.append(taken)
                launches[outcome.name].append(launch)
    finally:
        if collecting:
            gc.enable()
    if clock.on_cuda:
        for outcome, _ in running:
            outcome.launch = statistics.median(launches[outcome.name])
    return [outcome for outcome, _ in entries]


def summarise(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return for each contestant its times and the ratios to the first one's of the same rounds.

    A ratio above 1 means that the first contestant was faster.
    """
    reference = outcomes[0]
    summary = {}
    for outcome in outcomes:
        if outcome.missing is not None:
            summary[outcome.name] = {"missing": outcome.missing}
            continue
        row = {"rounds": len(outcome.seconds), **_spread(outcome.seconds)}
        row["first_call"] = outcome.first_call
        row["peak_bytes"] = outcome.peak_bytes
        if outcome.launch is not None:
            row["launch"] = outcome.launch
        if reference.missing is None:
            # Who sits out does so for good, so that the n-th times are of the same round.
            pairs = zip(outcome.seconds, reference.seconds, strict=False)
            row["ratio"] = _spread([own / other for own, other in pairs])
        summary[outcome.name] = row
    return summary


def attempt(function: Callable[[], Any]) -> Any:
    """Call somebody else's code.

    Raises:
        Missing: Whatever goes wrong in it, in one line.
    """
    try:
        return function()
    except Missing:
        raise
    except torch.cuda.OutOfMemoryError as error:
        raise Missing("out of memory") from error
    except ImportError as error:
        raise Missing(f"not installed: {error}") from error
    except Exception as error:
        text = re.sub(r"\S*/(\S+)", r"\1", " ".join(str(error).split()))  # no paths in results
        raise Missing(f"{type(error).__name__}: {text[:160]}") from error


def _make_ready(
    contestant: Contestant, case: Any, clock: Clock, outcome: Outcome, measure_memory: bool
) -> Prepared | None:
    """Prepare and warm up a contestant; None, and the reason in its outcome, if it cannot run."""
    try:
        prepared = attempt(lambda: contestant.prepare(case))
        outcome.first_call = attempt(lambda: clock.wall_time(prepared))
        outcome.second_call = attempt(lambda: clock.wall_time(prepared))
        if outcome.second_call > TOO_SLOW:
            raise Missing(f"one call takes {outcome.second_call:.0f} s")
        if measure_memory:
            outcome.peak_bytes = attempt(lambda: clock.peak_bytes(prepared))
        for _ in range(WARM_UPS[clock.device.type] if outcome.second_call < 0.1 else 0):
            attempt(lambda: clock.time(prepared))
    except Missing as reason:
        outcome.missing = str(reason)
        return None
    return prepared


def _spread(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive")
    return {
        "median": quartiles[1],
        "quartile_low": quartiles[0],
        "quartile_high": quartiles[2],
        "minimum": ordered[0],
        "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    }


def _peak_resident_bytes(function: Callable[[], Any]) -> int | None:
    """Return by how much the process grew at most during a call, where Linux tells."""
    status = Path("/proc/self/status")

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", status.read_text())[1])

    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would hide what is used again
        before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from now
    except (OSError, TypeError, AttributeError):
        return None
    function()
    return max(kilobytes("VmHWM") - before, 0) * 1024
