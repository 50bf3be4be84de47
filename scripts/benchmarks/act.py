"""``minrl benchmark act``: microseconds from observation to action."""

import functools
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.model_config import ModelConfig
from minrl.agents.plain_step import few_threads
from minrl.agents.step_policy import StepPolicy
from minrl.agents.trajectory import TrajectoryModel
from minrl.scripts.benchmarks.measuring import (
    Clock,
    Contestant,
    Missing,
    Prepared,
    compete,
    summarise,
)
from minrl.scripts.benchmarks.report import Report, duration, print_case

OBSERVATION_SIZE, ACTION_SIZE = 11, 3  # Hopper's
CONFIG = ModelConfig(width=128, num_layers=3)
BATCHES = {"quick": (1, 32), "default": (1, 32, 128, 1024), "full": (1, 8, 32, 128, 1024, 4096)}
MOST_ROUNDS = 20_000


@dataclass(frozen=True)
class ActCase:
    """One case: acting in ``batch`` environments at once.

    Attributes:
        batch: Environments.
        device: Where the model is.
    """

    batch: int
    device: torch.device

    @property
    def observations(self) -> np.ndarray:
        """Observations, (B, O)."""
        generator = np.random.default_rng(0)
        return generator.normal(size=(self.batch, OBSERVATION_SIZE)).astype(np.float32)


def run_act(grid: str, seconds: float, report: Report) -> None:
    """Measure and add to the report."""
    report.axes = ("environments at once", "seconds a step")
    contestants = [
        Contestant("minrl DecisionAgent.act", _prepare_agent),
        Contestant("minrl model.step (eager)", _prepare_eager),
        Contestant("exported to ONNX Runtime, 1 thread", _prepare_onnx),
        Contestant("nn.GRU of 3 layers, 1 step", _prepare_gru),
    ]
    for batch in BATCHES[grid]:
        case = ActCase(batch, report.device)
        clock = _HostClock(report.device)
        outcomes = compete(
            contestants, case, clock, seconds=seconds, most_rounds=MOST_ROUNDS, measure_memory=False
        )
        summary = summarise(outcomes)
        what = f"{CONFIG.num_layers} layers of {CONFIG.width}, MLP x{CONFIG.mlp_ratio}"
        print_case(f"act {what}, batch {batch}", summary)
        tails = (f"{k} {duration(v['p99'])}" for k, v in summary.items() if "p99" in v)
        print(f"  p99: {', '.join(tails)}")
        report.add("cases", {"batch": batch, "model": asdict(CONFIG), "times": summary})
        report.panel(what).add_times(batch, summary)
        report.save()


class _HostClock(Clock):
    """Times a call until its result is there, as a caller who acts on it waits for it."""

    def time(self, prepared: Prepared) -> tuple[float, float]:
        """Run once; return its seconds on the host, twice."""
        return (elapsed := self.wall_time(prepared)), elapsed


def _model(device: torch.device) -> TrajectoryModel:
    torch.manual_seed(0)
    return TrajectoryModel(OBSERVATION_SIZE, ACTION_SIZE, CONFIG).to(device).eval()


def _prepare_agent(case: ActCase) -> Prepared:
    """The public call: arrays in, arrays out, checks, what is asked for."""
    agent = DecisionAgent(_model(case.device), target_return=3600.0)
    agent.reset(num_envs=case.batch)
    observations, rewards = case.observations, np.ones(case.batch)
    agent.act(observations)
    return Prepared(lambda: agent.act(observations, rewards))


def _prepare_eager(case: ActCase) -> Prepared:
    """The model's step alone, on tensors that are there."""
    model = _model(case.device)
    observation = torch.from_numpy(case.observations).to(case.device)
    numbers = torch.zeros(case.batch, device=case.device)
    timestep = torch.zeros(case.batch, dtype=torch.int64, device=case.device)
    kept = {"state": model.initial_state(case.batch)}

    def step() -> None:
        _, kept["state"] = model.step(observation, numbers, timestep, kept["state"])

    return Prepared(_with_few_threads(step, case))


@functools.cache
def _onnx_policy() -> tuple[Callable, int]:
    """Return the exported step and the size of its state; exporting takes seconds."""
    import onnxruntime  # noqa: F401 - missing before anything is exported
    import onnxscript  # noqa: F401

    from minrl.agents.export import export_agent, load_onnx

    agent = DecisionAgent(_model(torch.device("cpu")), target_return=3600.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "agent.onnx")
        export_agent(agent, path, "onnx")
        return load_onnx(path), StepPolicy(agent.model).state_size


def _prepare_onnx(case: ActCase) -> Prepared:
    """The exported step alone on arrays that are there, one thread."""
    if case.device.type != "cpu":
        raise Missing("run on the CPU: minrl benchmark act --device cpu")
    policy, state_size = _onnx_policy()
    numbers, timestep = np.zeros(case.batch, np.float32), np.zeros(case.batch, np.int64)
    reset, observations = np.zeros(case.batch, bool), case.observations
    kept = {"state": np.zeros((case.batch, state_size), np.float32)}

    def step() -> None:
        _, kept["state"] = policy(observations, numbers, timestep, reset, kept["state"])

    return Prepared(step)


def _prepare_gru(case: ActCase) -> Prepared:
    """A recurrent core of equal width alone: no embeddings, norms, MLPs or head."""
    gru = nn.GRU(CONFIG.width, CONFIG.width, CONFIG.num_layers).to(case.device)
    x = torch.zeros(1, case.batch, CONFIG.width, device=case.device)
    kept = {"state": torch.zeros(CONFIG.num_layers, case.batch, CONFIG.width, device=case.device)}

    def step() -> None:
        _, kept["state"] = gru(x, kept["state"])

    return Prepared(_with_few_threads(step, case))


def _with_few_threads(step: Callable[[], None], case: ActCase) -> Callable[[], None]:
    """Let a step in PyTorch use as many threads as the agent's plain step does."""

    def run() -> None:
        with torch.inference_mode(), few_threads(case.batch):
            step()

    return run
