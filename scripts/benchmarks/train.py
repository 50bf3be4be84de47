"""``minrl benchmark train``: what a training step costs, whole, by context, and by its parts."""

import dataclasses
from collections import defaultdict
from dataclasses import dataclass

import torch

from minrl.agents.training import Trainer
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.windows import WindowSampler
from minrl.scripts.benchmarks.measuring import (
    Clock,
    Contestant,
    Prepared,
    compete,
    summarise,
)
from minrl.scripts.benchmarks.report import NAME_WIDTH, Report, duration, print_case
from minrl.scripts.benchmarks.synthetic import ACTION_SIZE, OBSERVATION_SIZE, make_episodes
from minrl.scripts.train_config import TrainConfig, paper, quick

DATASET_STEPS = 100_000
LONG_RUN = 100_000  # steps, the papers'
CONTEXTS = {"quick": (20, 100), "default": (20, 60, 125, 250, 500, 1000)}
CONTEXTS["full"] = CONTEXTS["default"]
# Environment steps in every batch of the comparison of contexts.
BATCH_STEPS = {
    "cpu": {"quick": 400, "default": 4000, "full": 8000},
    "cuda": {"quick": 4000, "default": 64_000, "full": 256_000},
}
PROFILED_STEPS, PROFILE_WARM_UPS = 10, 3
# Steps that are timed as one: a GPU is given the next before it has done the last, so that only
# many in a row show what one of them costs.
STEPS_TIMED = {"cpu": 1, "cuda": 20}

# What an operator or kernel belongs to, by a part of its name; the first that fits.
PARTS_OF_STEP = {
    "scan": "gated_scan gated_layer scan_forward scan_backward",
    "matrix products": "addmm aten::mm aten::bmm aten::linear gemm gemv cutlass xmma nvjet splitk",
    "optimizer": "adam optimizer _foreach multi_tensor linalg_vector_norm",
    "copies and indexing": "copy memcpy embedding index cat gather",
    "elementwise and reductions": "layer_norm gelu add mul sub div where tanh dropout bernoulli "
    "fill clamp square pow mean sum elementwise reduce sigmoid neg native_ random zero_ triton_",
}


@dataclass(frozen=True)
class TrainCase:
    """One way to train.

    Attributes:
        config: Model, optimisation, batch size and context.
        device: Where.
    """

    config: TrainConfig
    device: torch.device


def run_train(
    grid: str, precisions: list[str], profile: bool, seconds: float, report: Report
) -> None:
    """Measure the presets, contexts and, if asked, the parts of a step; add to the report."""
    report.axes = ("context, environment steps", "seconds a step, equal tokens")
    for precision in precisions:
        presets = {"quick": _at(quick(), precision)}
        if grid != "quick":
            presets = {"paper": _at(paper(), precision), **presets}
        _time_presets(presets, precision, seconds, report)
        report.save()
        for name, config in presets.items():
            _time_contexts(config, name, precision, grid, seconds, report)
            report.save()
        for name, config in presets.items() if profile else ():
            shares = profile_step(TrainCase(config, report.device))
            print(f"\nprofile of a step, {name} preset, {precision}")
            for part, share in shares.items():
                print(f"  {part:<{NAME_WIDTH}} {share:6.1%}")
            report.add("profiles", {"preset": name, "precision": precision, "shares": shares})


def profile_step(case: TrainCase) -> dict[str, float]:
    """Return which share of a training step's time goes into what, on its device."""
    trainer, sampler = _make(case)
    for _ in range(PROFILE_WARM_UPS):
        trainer.step_from(sampler)
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_cuda = case.device.type == "cuda"
    if on_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            trainer.step_from(sampler)
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        if on_cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue  # the operation that launched the kernel, whose time it repeats
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        times[_part_of(event.key)] += spent
    total = sum(times.values())
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {part: spent / total for part, spent in ordered if spent}


def _time_presets(
    presets: dict[str, TrainConfig], precision: str, seconds: float, report: Report
) -> None:
    """Time each preset's step as ``minrl train`` does it, and on a batch that is given."""
    contestants = []
    for name, config in presets.items():
        case = TrainCase(config, report.device)
        contestants.append(Contestant(name, lambda _, case=case: _prepare(case)))
        contestants.append(
            Contestant(f"{name}, one given batch", lambda _, case=case: _prepare(case, given=True))
        )
    clock = _StepClock(report.device)
    summary = summarise(compete(contestants, None, clock, seconds=seconds))
    print_case(f"train {precision}, one step", summary)
    for name, row in summary.items():
        if "median" in row:
            config = presets[name.removesuffix(", one given batch")]
            row["tokens_per_second"] = _tokens(config) / row["median"]
            row["seconds_of_100000_steps"] = LONG_RUN * row["median"]
            minutes = row["seconds_of_100000_steps"] / 60
            print(
                f"  {name:<{NAME_WIDTH}} {row['tokens_per_second']:10,.0f} tokens/s, "
                f"{LONG_RUN:,} steps in {minutes:.1f} minutes"
            )
    report.add("presets", {"precision": precision, "times": summary})


def _time_contexts(
    config: TrainConfig, name: str, precision: str, grid: str, seconds: float, report: Report
) -> None:
    """Compare contexts at an equal count of tokens in a batch, the shortest being the measure."""
    steps = BATCH_STEPS[report.device.type][grid]
    contestants, configs = [], {}
    for context in CONTEXTS[grid]:
        longer = dataclasses.replace(config, context=context, batch_size=steps // context)
        label = f"context {context}, batch {steps // context}"
        configs[label] = longer
        case = TrainCase(longer, report.device)
        contestants.append(Contestant(label, lambda _, case=case: _prepare(case)))
    clock = _StepClock(report.device)
    summary = summarise(compete(contestants, None, clock, seconds=seconds))
    print_case(f"train {precision}, {name} preset, {steps} environment steps a batch", summary)
    for label, row in summary.items():
        if "median" in row:
            row["tokens_per_second"] = _tokens(configs[label]) / row["median"]
            each = duration(row["median"] / _tokens(configs[label]))
            rate = f"{row['tokens_per_second']:10,.0f} tokens/s"
            print(f"  {label:<{NAME_WIDTH}} {rate}, {each} a token")
            report.panel(precision).add(name, configs[label].context, row["median"])
    values = {"model": name, "precision": precision, "environment_steps": steps}
    report.add("contexts", {**values, "times": summary})


class _StepClock(Clock):
    """Times training steps until they are done: the host's part of them belongs to them."""

    def time(self, prepared: Prepared) -> tuple[float, float]:
        """Take some steps; return the seconds of one on the host, twice."""
        elapsed = self.wall_time(prepared) / STEPS_TIMED[self.device.type]
        return elapsed, elapsed


def _prepare(case: TrainCase, given: bool = False) -> Prepared:
    trainer, sampler = _make(case)
    batch = sampler.batch(0)

    def take_steps() -> None:
        for _ in range(STEPS_TIMED[case.device.type]):
            if given:
                trainer.step(batch)
            else:
                trainer.step_from(sampler)

    return Prepared(take_steps)


def _make(case: TrainCase) -> tuple[Trainer, WindowSampler]:
    config = case.config
    torch.manual_seed(0)
    model = TrajectoryModel(OBSERVATION_SIZE, ACTION_SIZE, config.model)
    trainer = Trainer(model, config.optimization, total_steps=config.steps, device=case.device)
    sampler = WindowSampler(
        make_episodes(DATASET_STEPS),
        context=config.context,
        batch_size=config.batch_size,
        seed=0,
        condition=config.model.condition,
    )
    return trainer, sampler


def _at(config: TrainConfig, precision: str) -> TrainConfig:
    optimization = dataclasses.replace(config.optimization, precision=precision)
    return dataclasses.replace(config, optimization=optimization)


def _tokens(config: TrainConfig) -> int:
    """Return the tokens of a batch, padding included."""
    return config.batch_size * config.context * config.model.tokens_per_step


def _part_of(name: str) -> str:
    for part, patterns in PARTS_OF_STEP.items():
        if any(pattern in name.lower() for pattern in patterns.split()):
            return part
    return "everything else"
