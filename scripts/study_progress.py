"""How a study stands: a table redrawn on a terminal, a line for each event in a log file."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TextIO

from minrl.scripts.train_config import TrainConfig

TAIL = 65_536  # bytes of a run's metrics that are read at a time


class Progress:
    """Shows runs done, running and failed, step and last score of the running, and the time left.

    Args:
        runs: All runs of the study.
        missing: Those that are not finished.
        folder: Of the study; names of runs are relative to it.
        stream: Where to show it; by default standard output.
    """

    def __init__(
        self,
        runs: Sequence[TrainConfig],
        missing: Sequence[TrainConfig],
        folder: Path,
        stream: TextIO | None = None,
    ):
        self.stream = stream or sys.stdout
        self.folder, self.runs = folder, runs
        self.failed: dict[str, str] = {}
        self._steps: dict[str, int] = {}
        self._scores: dict[str, str] = {}
        self._seen: set[str] = set()
        self._lines_drawn = 0
        for run in runs:
            self._steps[self.name(run)] = self._read(run)
        self.done = {self.name(run) for run in runs if run not in missing}
        self._steps_before, self._started = sum(self._steps.values()), time.monotonic()
        self.say(f"{len(runs)} runs in {folder}, {len(self.done)} of them finished already")

    def name(self, run: TrainConfig) -> str:
        """Return a run's name in the study."""
        return run.run_dir.relative_to(self.folder).as_posix()

    def ended(self, run: TrainConfig, problem: str | None) -> None:
        """Take note that a run ended."""
        name = self.name(run)
        self._steps[name] = self._read(run)
        if problem is None:
            self.done.add(name)
            self.say(f"done     {name}{self._scores.get(name, '')}")
        else:
            self.failed[name] = problem
            self.say(f"failed   {name}: {problem}")

    def show(self, running: Sequence[TrainConfig]) -> None:
        """Show how everything stands now."""
        rows = []
        for run in running:
            name = self.name(run)
            self._steps[name] = self._read(run)
            rows.append(f"{name}  step {self._steps[name]} of {run.steps}{self._scores[name]}")
            if name not in self._seen:
                self._seen.add(name)
                if not self.stream.isatty():
                    self.say(f"started  {rows[-1]}  [{self._totals(len(running))}]")
        if self.stream.isatty():
            self._draw([self._totals(len(running)), *rows])

    def close(self) -> None:
        """Say how it ended, and name what failed."""
        self.say(self._totals(0))
        for name, problem in self.failed.items():
            self.say(f"FAILED   {name}: {problem}")

    def say(self, line: str) -> None:
        """Write a line that stays."""
        self._draw([])
        print(line, file=self.stream, flush=True)

    def _totals(self, running: int) -> str:
        going = [run for run in self.runs if self.name(run) not in self.failed]
        left = sum(run.steps - self._steps[self.name(run)] for run in going)
        made = sum(self._steps.values()) - self._steps_before
        time_left: timedelta | str = "?"
        if made > 0 or not left:
            seconds = (time.monotonic() - self._started) * left / max(made, 1)
            time_left = timedelta(seconds=round(seconds))
        counts = f"{len(self.done)} of {len(self.runs)} done, {running} running"
        return f"{counts}, {len(self.failed)} failed, time left {time_left}"

    def _read(self, run: TrainConfig) -> int:
        """Return the step a run has come to; remember its last score at the first target."""
        name, metrics = self.name(run), run.run_dir / "metrics.jsonl"
        step = scored_at = 0
        self._scores.setdefault(name, "")
        if not metrics.exists():
            return 0
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - TAIL))
            lines = file.read().splitlines()
        for line in lines:
            with contextlib.suppress(ValueError):  # being written, or cut by where we began
                row = json.loads(line)
                step = row["step"]
                for tag, value in row.items():
                    if tag.endswith("/normalized_score_mean") and step != scored_at:
                        self._scores[name], scored_at = f"  score {value:.1f}", step
        return step

    def _draw(self, lines: list[str]) -> None:
        """Replace the table that was drawn last, on a terminal."""
        width = shutil.get_terminal_size().columns - 1
        up = f"\x1b[{self._lines_drawn}F\x1b[J" if self._lines_drawn else ""
        self.stream.write(up + "".join(f"{line[:width]}\n" for line in lines))
        self.stream.flush()
        self._lines_drawn = len(lines)
