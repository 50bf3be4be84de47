"""``minrl doctor``: what is installed here, and whether a small run from data to acting works."""

import contextlib
import dataclasses
import importlib.metadata
import io
import os
import platform
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from minrl import __version__
from minrl.agents.decision_agent import DecisionAgent
from minrl.data.behaviours import make_embedded_dataset
from minrl.data.dataset_ids import datasets_root, temporary_datasets
from minrl.data.episodes import Episodes
from minrl.data.minari_source import list_datasets, load_dataset
from minrl.envs.make import make_env
from minrl.envs.rollout import evaluate
from minrl.envs.video import choose_gl
from minrl.errors import ConfigError, EnvError, MinrlError
from minrl.scripts.machine import cpu_name, describe_gpu, total_memory, version_of
from minrl.scripts.train import train
from minrl.scripts.train_config import TrainConfig, quick

GIB = 2**30
LEAST_FREE = 2 * GIB  # an embedded dataset takes some 30 MiB, a downloaded one up to 1 GiB
DATASET, ENVIRONMENT = "minrl/hopper/medium-v0", "Hopper-v5"
SAMPLE_STEPS, TRAINING_STEPS, ACTING_STEPS = 4_000, 30, 300

# An action is of the order of 1; kernels that differ by more are wrong, not just rounded otherwise.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: of the check.
        status: "ok", "note" for what only some users need, or "FAILED".
        detail: one line.
    """

    name: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<6}  {self.name:<10}  {self.detail}"


def doctor(device: str = "auto") -> int:
    """Print what a bug report needs, and check this machine by a small run from data to acting.

    Args:
        device: As in minrl train: auto, cpu, cuda, cuda:1 ...

    Returns:
        The exit status: 1 if anything that every user needs has failed.
    """
    start = time.perf_counter()
    findings = []
    for finding in examine(device):
        print(finding, flush=True)
        findings.append(finding)
    failed = sum(finding.status == "FAILED" for finding in findings)
    seconds = time.perf_counter() - start
    verdict = f"{failed} of {len(findings)} checks failed" if failed else "everything works"
    print(f"{verdict} ({seconds:.1f} s)")
    return 1 if failed else 0


def examine(device: str) -> Iterator[Finding]:
    """Make all checks, each as far as it goes: one that fails does not keep others from running."""
    checks: list[tuple[str, Callable[[], tuple[str, str]]]] = [
        ("versions", check_versions),
        ("extras", check_extras),
        ("processor", check_processor),
        ("gpu", check_gpus),
        ("datasets", check_datasets),
        ("rendering", check_rendering),
        ("mujoco", check_mujoco),
        ("round trip", lambda: check_round_trip(device)),
    ]
    for name, check in checks:
        try:
            status, detail = check()
        except MinrlError as error:
            status, detail = "FAILED", str(error)
        except Exception as error:  # whatever is broken here is what is looked for
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            status, detail = "FAILED", f"{type(error).__name__} at {where}: {error}"
        yield Finding(name, status, " ".join(detail.split()))


def check_versions() -> tuple[str, str]:
    """Name Python, this package, and every library that it needs."""
    python = f"minrl {__version__}, Python {platform.python_version()}"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    versions = {name: version_of(name) for name in (*_requirements()[""], "mujoco")}
    missing = [name for name, version in versions.items() if version is None]
    listed = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if missing:
        return "FAILED", f"not installed: {', '.join(missing)} ({python}, {system}; {listed})"
    return "ok", f"{python}, {system}; {listed}"


def check_extras() -> tuple[str, str]:
    """Name the optional libraries that are there and the extras that bring the others."""
    present, absent = {}, []
    for extra, names in _requirements().items():
        versions = {name: version_of(name) for name in names}
        if extra:
            present |= {name: version for name, version in versions.items() if version}
            absent += [extra] if None in versions.values() else []
    listed = ", ".join(f"{name} {present[name]}" for name in sorted(present)) or "none"
    return "ok", f"{listed}; extras not installed whole: {', '.join(absent) or 'none'}"


def check_processor() -> tuple[str, str]:
    """Name the processor, its memory, and the threads that torch uses."""
    memory = total_memory()
    described = "unknown" if memory is None else f"{memory / GIB:.1f} GiB"
    return "ok", (
        f"{cpu_name()}, {os.cpu_count()} cores, memory {described}; torch uses "
        f"{torch.backends.cpu.get_cpu_capability()} and {torch.get_num_threads()} of the cores"
    )


def check_gpus() -> tuple[str, str]:
    """Name the GPUs that torch can use."""
    if not torch.cuda.is_available():
        built_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        return "note", f"none that torch can use (this torch is built {built_for})"
    gpus = [describe_gpu(torch.device("cuda", n)) for n in range(torch.cuda.device_count())]
    listed = ", ".join(f"{gpu['name']} {gpu['memory_bytes'] / GIB:.0f} GiB" for gpu in gpus)
    return "ok", f"{listed}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def check_datasets() -> tuple[str, str]:
    """Look at the datasets' folder: its place, what it holds, whether there is room in it."""
    root = datasets_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return "FAILED", (
            f"{existing} is no folder that can be written; set MINARI_DATASETS_PATH to another"
        )
    free = shutil.disk_usage(existing).free
    local = sum(row.is_local for row in list_datasets())
    found = f"{root}: {local} datasets, {free / GIB:.1f} GiB free"
    return ("ok", found) if free >= LEAST_FREE else ("note", f"{found}, which is little")


def check_rendering() -> tuple[str, str]:
    """Find out how videos can be rendered without a display."""
    before = os.environ.get("MUJOCO_GL")
    try:
        return "ok", choose_gl()
    except EnvError as error:
        return "note", f"no videos: {error}"
    finally:
        if before is None:  # for this process it is decided by whoever renders
            os.environ.pop("MUJOCO_GL", None)


def check_mujoco() -> tuple[str, str]:
    """Step a simulation and measure how fast it is."""
    with contextlib.closing(make_env(ENVIRONMENT)) as environment:
        environment.reset(seed=0)
        action = np.zeros(environment.action_space.shape, environment.action_space.dtype)
        start = time.perf_counter()
        for _ in range(ACTING_STEPS):
            _, reward, terminated, _, _ = environment.step(action)
            if not np.isfinite(reward):
                return "FAILED", f"{ENVIRONMENT} gave the reward {reward}"
            if terminated:
                environment.reset()
        rate = ACTING_STEPS / (time.perf_counter() - start)
    return "ok", f"{ENVIRONMENT} makes {rate:,.0f} steps a second"


def check_round_trip(device: str) -> tuple[str, str]:
    """Make data, train, save, load and act in a temporary folder; compare acting and training."""
    folders = tempfile.TemporaryDirectory(prefix="minrl-doctor-")
    with temporary_datasets(), folders as folder, _silence():
        clock = _Clock()
        make_embedded_dataset(DATASET, steps=SAMPLE_STEPS, progress=False)
        episodes = load_dataset(DATASET, download=False)
        clock.lap("data")
        run = train(_small_run(device, Path(folder) / "run"))
        clock.lap(f"{TRAINING_STEPS} training steps")
        agent = DecisionAgent.load(run, checkpoint="last", device=device)
        evaluate(agent, ENVIRONMENT, episodes=2, max_episode_steps=ACTING_STEPS // 2)
        clock.lap("saved, loaded, acted")
        difference = difference_to_training(agent, episodes)
        clock.lap("compared")
    found = f"on {agent.device}: {clock}; acting and training differ by {difference:.0e}"
    return ("ok" if difference <= TOLERANCE else "FAILED"), found


def difference_to_training(agent: DecisionAgent, episodes: Episodes) -> float:
    """Return the largest difference of actions chosen one at a time and all in parallel.

    Args:
        agent: It is given the observations and rewards of the first episode.
        episodes: Real ones of its environment.
    """
    steps = min(int(episodes.lengths[0]), ACTING_STEPS)
    observations, rewards = episodes.observations[:steps], episodes.rewards[:steps]
    agent.reset(num_envs=1)
    before = np.concatenate([[0.0], rewards[:-1]])
    chosen = [
        agent.act(observation[None], np.array([reward]))[0]
        for observation, reward in zip(observations, before, strict=True)
    ]
    actions = np.stack(chosen)
    spent = np.cumsum(before) if agent.model.config.condition == "return-to-go" else np.zeros(steps)
    returns = (agent.target_return - spent).astype(np.float32)
    with torch.no_grad():
        inputs = (observations, actions, returns, np.arange(steps))
        tensors = [torch.from_numpy(array)[None].to(agent.device) for array in inputs]
        predicted, _ = agent.model(*tensors)
    return float(np.abs(predicted[0].cpu().numpy() - actions).max())


class _Clock:
    """Seconds of each part of the round trip."""

    def __init__(self) -> None:
        self._laps: list[str] = []
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps.append(f"{name} {now - self._last:.1f} s")
        self._last = now

    def __str__(self) -> str:
        return ", ".join(self._laps)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep back what a run prints, progress bars included: the findings are what is asked for."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _small_run(device: str, folder: Path) -> TrainConfig:
    return dataclasses.replace(
        quick((DATASET,)),
        steps=TRAINING_STEPS,
        eval_every=TRAINING_STEPS,
        eval_episodes=0,
        final_episodes=0,
        device=device,
        run_dir=folder,
    )


def _requirements() -> dict[str, list[str]]:
    """Return the distributions that this package asks for, by extra; "" for what it needs."""
    found: dict[str, list[str]] = {}
    try:
        requirements = importlib.metadata.requires("minrl") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("minrl is not installed, only imported: pip install it") from error
    for requirement in requirements:
        name = re.match(r"[\w.-]+", requirement)[0]
        extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", requirement)
        found.setdefault(extra[1] if extra else "", []).append(name)
    return found
