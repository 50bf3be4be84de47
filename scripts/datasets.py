"""`minrl datasets`: make the embedded datasets, list, inspect, and import your own and D4RL's."""

from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from minrl.data.array_source import import_arrays
from minrl.data.behaviours import EMBEDDED_IDS, make_embedded_dataset
from minrl.data.d4rl_source import import_d4rl
from minrl.data.dataset_ids import dataset_folder
from minrl.data.episodes import DatasetInfo, Episodes
from minrl.data.minari_source import list_datasets, load_dataset
from minrl.data.minari_writer import DatasetCard
from minrl.envs.make import check_spaces, make_env
from minrl.envs.scores import REFERENCE_SCORES, percent_of, reference_scores
from minrl.errors import ConfigError, EnvError

_QUANTILES = {"min": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "max": 1.0}


def make_command(
    ids: tyro.conf.Positional[tuple[str, ...]] = (),
    steps: int = 200_000,
    seed: int = 0,
) -> None:
    """Make embedded datasets ahead of time; without ids, all nine.

    Args:
        ids: Ids such as minrl/hopper/medium-v0.
        steps: Transitions of each; D4RL's have a million.
        seed: Of episode starts and action noise.
    """
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, got {seed}")
    for dataset_id in ids or EMBEDDED_IDS:
        made = make_embedded_dataset(dataset_id, steps=steps, seed=seed)
        state = (
            "made" if made else "exists already, left as it is; remove its folder to make it anew"
        )
        print(f"{dataset_id}: {state} ({dataset_folder(dataset_id)})")


def list_command() -> None:
    """List the datasets on this machine, and the embedded ones that can be made."""
    rows = list_datasets()
    width = max(len(row.dataset_id) for row in rows)
    print(f"{'id':<{width}}  {'episodes':>8}  {'steps':>9}  environment")
    for row in rows:
        if row.num_steps is not None:
            counts = f"{row.num_episodes:>8,}  {row.num_steps:>9,}  {row.environment_id or '?'}"
        elif row.is_local:
            counts = "(not usable by minrl)"
        else:
            counts = "(made on first use)"
        print(f"{row.dataset_id:<{width}}  {counts}")


def inspect_command(
    ids: tyro.conf.Positional[tuple[str, ...]],
    png: Path | None = None,
    on_bad_episode: Annotated[str, tyro.conf.arg(metavar="raise|drop")] = "raise",
) -> None:
    """Print what is in a dataset (or in the union of several) and draw its histograms.

    Args:
        ids: One id or several.
        png: Where to write the picture; by default named after the dataset, in this folder.
        on_bad_episode: "drop" leaves out episodes that break a rule, and says so.
    """
    episodes = load_dataset(ids, on_bad_episode=on_bad_episode)
    print("\n".join(describe(episodes)))
    path = png or Path(episodes.info.dataset_id.replace("/", "-").replace("+", "_") + ".png")
    plot_histograms(episodes, path)
    print(f"histograms of lengths and returns: {path}")


def import_d4rl_command(
    file: tyro.conf.Positional[Path],
    id: str | None = None,
    on_bad_episode: Annotated[str, tyro.conf.arg(metavar="raise|drop")] = "raise",
) -> None:
    """Turn a D4RL v2 file (HDF5) into a Minari dataset.

    Args:
        file: Such as hopper_medium-v2.hdf5.
        id: Id to give it; by default d4rl/hopper/medium-v2 and so on, after the file's name.
        on_bad_episode: "drop" leaves out episodes that break a rule, and says so.
    """
    dataset_id = import_d4rl(
        file, id, reference_scores=REFERENCE_SCORES, on_bad_episode=on_bad_episode
    )
    print("\n".join(describe(load_dataset(dataset_id))))


def import_arrays_command(
    file: tyro.conf.Positional[Path],
    id: str,
    environment: str,
    reference_scores: tuple[float, float] | None = None,
    algorithm: str = "unknown",
    on_bad_episode: Annotated[str, tyro.conf.arg(metavar="raise|drop")] = "raise",
) -> None:
    """Turn an .npz file of your own into a Minari dataset.

    The file holds flat arrays as D4RL's, one episode after the other: observations, actions,
    rewards, terminals, timeouts, and next_observations if you have them.

    Args:
        file: Written by numpy.savez.
        id: Id to give it, such as me/pendulum/mine-v0.
        environment: Gymnasium id of the environment it is from.
        reference_scores: Returns that score 0 and 100 percent.
        algorithm: What chose the actions.
        on_bad_episode: "drop" leaves out episodes that break a rule, and says so.
    """
    made = make_env(environment)
    check_spaces(made)
    card = DatasetCard(
        dataset_id=id,
        environment_id=environment,
        observation_space=made.observation_space,
        action_space=made.action_space,
        algorithm_name=algorithm,
        description=f"Imported from {file.name}.",
        reference_scores=reference_scores,
    )
    made.close()
    import_arrays(file, card, on_bad_episode)
    print("\n".join(describe(load_dataset(id))))


def describe(episodes: Episodes) -> list[str]:
    """Return the lines of a table: counts, and quantiles of lengths, returns and scores."""
    info = episodes.info
    terminated, truncated = episodes.terminated, episodes.truncated & ~episodes.terminated
    unfinished = ~(terminated | truncated)
    rows = {"length": episodes.lengths, "return": episodes.returns}
    if references := _find_references(info):
        rows["score, %"] = percent_of(episodes.returns, references)
    header = "".join(f"{name:>11}" for name in ("mean", "std", *_QUANTILES))
    lines = [
        f"dataset      {info.dataset_id}",
        f"environment  {info.environment_id or 'not known'}"
        + (f", {limit:,} steps at most" if (limit := info.max_episode_steps) else ""),
        f"sizes        observation {info.observation_size}, action {len(info.action_low)}",
        f"steps        {episodes.num_steps:,}",
        f"episodes     {episodes.num_episodes:,} ({terminated.sum():,} terminated, "
        f"{truncated.sum():,} truncated, {unfinished.sum():,} unfinished)",
        f"scores       {info.score_note if references else 'no reference scores are known'}",
        f"sha256       {info.sha256}",
        "",
        f"{'per episode':<11}{header}",
    ]
    for name, values in rows.items():
        numbers = [values.mean(), values.std(), *np.quantile(values, list(_QUANTILES.values()))]
        lines.append(f"{name:<11}" + "".join(f"{format_number(number):>11}" for number in numbers))
    return lines


def format_number(number: float) -> str:
    """Return a number in few characters: with one digit behind the point, if that says enough."""
    if number == 0 or 1 <= abs(number) < 999_999:
        return f"{number:,.1f}"
    return f"{number:.3g}"


def plot_histograms(episodes: Episodes, path: Path) -> None:
    """Draw how lengths and returns are distributed over the episodes, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(
        f"{episodes.info.dataset_id}: {episodes.num_episodes:,} episodes, "
        f"{episodes.num_steps:,} steps"
    )
    length_axis, return_axis = figure.subplots(1, 2)
    length_axis.hist(episodes.lengths, bins=50, color="tab:blue")
    length_axis.set_xlabel("episode length (steps)")
    length_axis.set_ylabel("episodes")
    return_axis.hist(episodes.returns, bins=50, color="tab:orange")
    return_axis.set_xlabel("return (reward units)")
    if (references := _find_references(episodes.info)) is not None:
        low, high = references
        score_axis = return_axis.secondary_xaxis(
            "top",
            functions=(
                lambda returns: percent_of(returns, references),
                lambda scores: low + scores * (high - low) / 100,
            ),
        )
        score_axis.set_xlabel("normalised score (%)")
    figure.savefig(path, dpi=120, format="png")


def _find_references(info: DatasetInfo) -> tuple[float, float] | None:
    """Return the returns for 0 and 100 percent, the dataset's own or D4RL's; None without any."""
    if info.references is not None:
        return info.references
    try:
        return reference_scores(info.environment_id or "")
    except EnvError:
        return None


COMMANDS = {
    "make": make_command,
    "list": list_command,
    "inspect": inspect_command,
    "import": import_arrays_command,
    "import-d4rl": import_d4rl_command,
}
"""Name of each subcommand and what runs it."""
