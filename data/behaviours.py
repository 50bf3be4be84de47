"""The embedded datasets: small trained policies, rolled out into Minari datasets on first use."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minrl.data.dataset_ids import EMBEDDED_IDS, check_id, dataset_folder, near_matches
from minrl.data.episodes import Episode
from minrl.data.minari_writer import DatasetCard, dataset_lock, write_dataset
from minrl.errors import DatasetError

if TYPE_CHECKING:
    import gymnasium
    from tqdm import tqdm

_FOLDER = Path(__file__).parent / "policies"
_NUM_ENVS = 16  # part of what a seed means: another number gives other data


class BehaviourPolicy:
    """A Gaussian actor with two hidden layers, trained online (PPO, or SAC when squashed).

    Args:
        weights: The arrays of a policy file.
        noise_scale: Factor on the standard deviation of the actions; 0 acts at the mean.
    """

    def __init__(self, weights: dict[str, np.ndarray], noise_scale: float = 1.0) -> None:
        self._weights = weights
        self._noise_scale = np.float32(noise_scale)

    @classmethod
    def load(cls, name: str, noise_scale: float | None = None) -> BehaviourPolicy:
        """Load a shipped policy such as "hopper-medium".

        Args:
            name: File name without its ending; ``policies/manifest.json`` lists them all.
            noise_scale: None takes the one its dataset is made with.

        Raises:
            DatasetError: If there is no such policy.
        """
        entries = {
            Path(entry["file"]).stem: entry
            for environment in _manifest().values()
            for entries in environment["levels"].values()
            for entry in entries
        }
        if name not in entries:
            raise DatasetError(f"no behaviour policy {name!r}; there are {', '.join(entries)}")
        with np.load(_FOLDER / entries[name]["file"], allow_pickle=False) as file:
            weights = dict(file)
        scale = entries[name]["noise_scale"] if noise_scale is None else noise_scale
        return cls(weights, scale)

    def act(self, observations: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Sample actions (B, A) float32 in [-1, 1] for observations (B, O)."""
        weights = self._weights
        inputs = observations.astype(np.float32)
        if not weights["squash"]:
            inputs = (inputs - weights["obs_mean"]) / weights["obs_std"]
            inputs = np.clip(inputs, -10, 10, dtype=np.float32)
        hidden = self._activate(inputs @ weights["w0"].T + weights["b0"])
        hidden = self._activate(hidden @ weights["w1"].T + weights["b1"])
        mean = hidden @ weights["w_mean"].T + weights["b_mean"]
        if weights["squash"]:
            log_std = np.clip(hidden @ weights["w_log_std"].T + weights["b_log_std"], -20, 2)
        else:
            log_std = weights["log_std"]
        noise = generator.standard_normal(mean.shape, dtype=np.float32)
        actions = mean + self._noise_scale * np.exp(log_std) * noise
        actions = np.tanh(actions) if weights["squash"] else np.clip(actions, -1, 1)
        return actions.astype(np.float32)

    def _activate(self, values: np.ndarray) -> np.ndarray:
        return np.tanh(values) if self._weights["activation"] == "tanh" else np.maximum(values, 0)


@cache
def _manifest() -> dict[str, Any]:
    """Read which policies exist, from which environment, and what they return."""
    return json.loads((_FOLDER / "manifest.json").read_text())


@dataclass
class _Recording:
    """An episode in the making."""

    number: int
    observations: list[np.ndarray]
    actions: list[np.ndarray] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False

    def cut(self, steps: int) -> Episode:
        """Return the first ``steps`` steps; an episode cut short counts as truncated."""
        whole = steps >= len(self.actions)
        return Episode(
            observations=np.array(self.observations[: steps + 1]),
            actions=np.array(self.actions[:steps]),
            rewards=np.array(self.rewards[:steps]),
            terminated=self.terminated and whole,
            truncated=self.truncated or not (self.terminated and whole),
        )


def roll_out(
    policy: BehaviourPolicy,
    environments: Sequence[gymnasium.Env],
    steps: int,
    seed: np.random.SeedSequence,
    bar: tqdm | None = None,
) -> list[Episode]:
    """Record exactly ``steps`` steps of a policy, several environments side by side.

    Episodes are numbered as they begin, and the result is the first episodes by number, the last
    one cut: what a single environment would give, one episode after the other. Taking whichever
    episodes end first would favour short ones.

    Args:
        policy: Whose actions to record.
        environments: Copies of one environment; their number is part of what the seed means.
        steps: Transitions to record.
        seed: Fixes the start of every episode and the noise of the actions.
        bar: Moved on by each step.
    """
    generator = np.random.default_rng(seed)
    recordings: list[_Recording] = []

    def begin(environment: gymnasium.Env) -> tuple[gymnasium.Env, _Recording]:
        start_seed = int(generator.integers(2**31))
        observation, _ = environment.reset(seed=start_seed)
        recordings.append(_Recording(len(recordings), [observation]))
        return environment, recordings[-1]

    running = [begin(environment) for environment in environments]
    recorded = 0
    while running:
        observations = np.stack([recording.observations[-1] for _, recording in running])
        for (environment, recording), action in zip(
            running, policy.act(observations, generator), strict=True
        ):
            _step(environment, recording, action)
        if bar is not None:
            bar.update(min(len(running), max(steps - recorded, 0)))
        recorded += len(running)
        done_at = _first_unneeded(recordings, steps) if recorded >= steps else len(recordings)
        running = [
            begin(environment) if _ended(recording) else (environment, recording)
            for environment, recording in running
            if recording.number < done_at and not (_ended(recording) and recorded >= steps)
        ]
    return list(_cut_to(recordings, steps))


def _step(environment: gymnasium.Env, recording: _Recording, action: np.ndarray) -> None:
    """Take one step and record it."""
    observation, reward, terminated, truncated, _ = environment.step(action)
    recording.observations.append(observation)
    recording.actions.append(action)
    recording.rewards.append(float(reward))
    recording.terminated = bool(terminated)
    recording.truncated = bool(truncated)


def _ended(recording: _Recording) -> bool:
    return recording.terminated or recording.truncated


def _first_unneeded(recordings: Sequence[_Recording], steps: int) -> int:
    """Return the number of the first episode that ``steps`` steps already reach the end of.

    It and all later ones can stop: the episodes before can only grow.
    """
    total = np.cumsum([len(recording.actions) for recording in recordings])
    return int(np.searchsorted(total, steps))


def _cut_to(recordings: Sequence[_Recording], steps: int) -> Iterator[Episode]:
    """Yield the first episodes, ``steps`` steps in all."""
    left = steps
    for recording in recordings:
        if left == 0:
            return
        episode = recording.cut(left)
        left -= len(episode.actions)
        yield episode


def make_embedded_dataset(
    dataset_id: str, *, steps: int = 200_000, seed: int = 0, progress: bool = True
) -> bool:
    """Make an embedded dataset and write it as an ordinary Minari dataset.

    ``medium`` is one policy; ``medium-expert`` half the steps medium, half expert at half the
    noise; ``medium-replay`` equal steps of each policy of a training run, in training order. The
    result is a function of (id, steps, seed). Each part has exactly its share of the steps, so its
    last episode may be cut short (and is marked truncated).

    Args:
        dataset_id: One of ``EMBEDDED_IDS``.
        steps: Transitions in all.
        seed: Of episode starts and action noise.
        progress: Show a progress bar on a terminal.

    Returns:
        True if it was made now, False if it existed already or another process made it meanwhile.

    Raises:
        DatasetError: If the id is not an embedded one, steps are too few, or the folder is
            read-only.
    """
    check_id(dataset_id)
    if dataset_id not in EMBEDDED_IDS:
        near = near_matches(dataset_id, EMBEDDED_IDS) or EMBEDDED_IDS
        raise DatasetError(f"{dataset_id} is no embedded dataset; did you mean {', '.join(near)}?")
    levels = _segments(dataset_id)
    if steps < len(levels):
        raise DatasetError(f"steps must be at least {len(levels)} for {dataset_id}, got {steps}")
    with dataset_lock(dataset_id):
        if dataset_folder(dataset_id).exists():
            return False
        _make(dataset_id, levels, steps, seed, progress)
    return True


def _segments(dataset_id: str) -> list[str]:
    """Return the names of the policies a dataset is made of, in order."""
    _, environment, level = dataset_id.removesuffix("-v0").split("/")
    levels = _manifest()[environment]["levels"]
    parts = {"medium-replay": ["replay"], "medium-expert": ["medium", "expert"]}
    return [
        Path(entry["file"]).stem
        for part in parts.get(level, [level])
        for entry in sorted(levels[part], key=lambda entry: entry["training_steps"])
    ]


def _make(dataset_id: str, names: Sequence[str], steps: int, seed: int, progress: bool) -> None:
    """Roll out the policies in turn and write the dataset."""
    import gymnasium
    import mujoco
    from tqdm.auto import tqdm

    from minrl.envs.make import make_env
    from minrl.envs.scores import REFERENCE_SCORES

    key = dataset_id.split("/")[1]
    environment_id = _manifest()[key]["env"]
    environments = [make_env(environment_id) for _ in range(_NUM_ENVS)]
    seeds = np.random.SeedSequence((seed, zlib.crc32(dataset_id.encode()))).spawn(len(names))
    episodes: list[Episode] = []
    try:
        hide = None if progress else True  # None: hidden unless on a terminal
        with tqdm(total=steps, desc=f"making {dataset_id}", unit="step", disable=hide) as bar:
            for index, (name, segment_seed) in enumerate(zip(names, seeds, strict=True)):
                share = steps // len(names) + (index < steps % len(names))
                policy = BehaviourPolicy.load(name)
                episodes += roll_out(policy, environments, share, segment_seed, bar)
        card = DatasetCard(
            dataset_id=dataset_id,
            environment_id=environment_id,
            observation_space=environments[0].observation_space,
            action_space=environments[0].action_space,
            algorithm_name=_manifest()[key]["algorithm"],
            description=(
                f"{steps} steps in {environment_id} by behaviour policies shipped with minrl "
                f"({', '.join(names)}), seed {seed}. Reference scores are D4RL's; the physics and "
                "the policies are not, so scores are not comparable with D4RL's tables."
            ),
            reference_scores=REFERENCE_SCORES[key],
            requirements=(
                f"gymnasium=={gymnasium.__version__}",
                f"mujoco=={mujoco.__version__}",
            ),
        )
        write_dataset(card, episodes)
    finally:
        for environment in environments:
            environment.close()
