"""``minrl benchmark data``: loading a large dataset and drawing windows from it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from minrl.data.dataset_ids import temporary_datasets
from minrl.data.episodes import Episodes
from minrl.data.windows import WindowSampler
from minrl.scripts.benchmarks.measuring import Clock, Contestant, Prepared, compete, summarise
from minrl.scripts.benchmarks.report import Report, print_case
from minrl.scripts.benchmarks.synthetic import make_episodes

STEPS = {"quick": 20_000, "default": 1_000_000, "full": 4_000_000}
WINDOWS = ((64, 20), (128, 20), (64, 100), (4, 1000))  # windows a batch, steps a window
DATASET_ID = "synthetic/noise-v0"


def run_data(grid: str, seconds: float, report: Report) -> None:
    """Measure and add to the report."""
    steps = STEPS[grid]
    episodes = make_episodes(steps)
    with _written(episodes) as folder:
        contestants = [
            Contestant("load_dataset, cached", lambda _: Prepared(_load)),
            Contestant("load_dataset, first time", lambda _: _prepare_first_load(folder)),
            Contestant("read the dataset's files", lambda _: _prepare_reading(folder)),
        ]
        outcomes = compete(contestants, None, Clock(torch.device("cpu")), seconds=seconds)
    summary = summarise(outcomes)
    print_case(f"loading {steps:,} steps", summary)
    report.add("loading", {"steps": steps, "times": summary})
    report.save()
    _time_sampling(episodes, seconds, report)


def _time_sampling(episodes: Episodes, seconds: float, report: Report) -> None:
    contestants = []
    for batch, context in WINDOWS:
        sampler = WindowSampler(episodes, context=context, batch_size=batch, seed=0)
        name = f"{batch} windows of {context} steps"
        contestants.append(Contestant(name, lambda _, sampler=sampler: _prepare_sampling(sampler)))
    outcomes = compete(contestants, None, Clock(torch.device("cpu")), seconds=seconds)
    summary = summarise(outcomes)
    print_case(f"drawing windows from {episodes.num_steps:,} steps", summary)
    for (batch, context), row in zip(WINDOWS, summary.values(), strict=True):
        row["environment_steps_per_second"] = batch * context / row["median"]
    report.add("sampling", {"steps": episodes.num_steps, "times": summary})


def _prepare_sampling(sampler: WindowSampler) -> Prepared:
    steps = iter(range(1 << 40))
    return Prepared(lambda: sampler.batch(next(steps)))


def _prepare_first_load(folder: Path) -> Prepared:
    """Without the flat arrays that the load before left behind."""

    def forget() -> None:
        for cache in folder.rglob("minrl_flat.cache"):
            cache.unlink()

    return Prepared(_load, before=forget)


def _prepare_reading(folder: Path) -> Prepared:
    """Read the files' bytes and nothing else."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return Prepared(lambda: sum(len(path.read_bytes()) for path in files))


def _load() -> Episodes:
    from minrl.data.minari_source import load_dataset

    return load_dataset(DATASET_ID, download=False, progress=False)


@contextmanager
def _written(episodes: Episodes) -> Iterator[Path]:
    """Write the episodes as a Minari dataset in a folder of its own, that is removed again."""
    from gymnasium.spaces import Box

    from minrl.data.episodes import Episode
    from minrl.data.minari_writer import DatasetCard, write_dataset

    card = DatasetCard(
        dataset_id=DATASET_ID,
        environment_id="Hopper-v5",
        observation_space=Box(-np.inf, np.inf, episodes.observations.shape[1:], np.float32),
        action_space=Box(-1.0, 1.0, episodes.actions.shape[1:], np.float32),
        algorithm_name="noise",
        description="noise, to time the loading of",
    )
    single = []
    for index, (start, stop) in enumerate(
        zip(episodes.offsets[:-1], episodes.offsets[1:], strict=True)
    ):
        last = episodes.final_observations[index : index + 1]
        single.append(
            Episode(
                np.concatenate([episodes.observations[start:stop], last]),
                episodes.actions[start:stop],
                episodes.rewards[start:stop],
                bool(episodes.terminated[index]),
                bool(episodes.truncated[index]),
            )
        )
    with temporary_datasets() as folder:
        write_dataset(card, single)
        yield folder
