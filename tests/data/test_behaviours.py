import subprocess
import sys

import numpy as np
import pytest

from minrl.data.behaviours import BehaviourPolicy, make_embedded_dataset, roll_out
from minrl.data.dataset_ids import EMBEDDED_IDS
from minrl.data.minari_source import load_dataset
from minrl.envs.make import make_env
from minrl.envs.scores import REFERENCE_SCORES
from minrl.errors import DatasetError

HOPPER = "minrl/hopper/medium-v0"


class Countdown:
    """An environment whose episodes last as long as its seed says; actions are ignored."""

    def reset(self, *, seed):
        self.left = seed % 7 + 1
        self.count = 0
        return np.array([self.left, 0.0]), {}

    def step(self, action):
        self.left -= 1
        self.count += 1
        return np.array([self.left, self.count]), 1.0, self.left == 0, False, {}


class Still:
    """A policy that does nothing."""

    def act(self, observations, generator):
        return np.zeros((len(observations), 1), np.float32)


@pytest.mark.parametrize("steps", [1, 5, 16, 100, 1000])
def test_roll_out_has_exactly_the_steps_asked_for_and_whole_episodes_but_the_last(steps):
    environments = [Countdown() for _ in range(4)]
    episodes = roll_out(Still(), environments, steps, np.random.SeedSequence(0))
    assert sum(len(episode.actions) for episode in episodes) == steps
    for index, episode in enumerate(episodes):
        length = len(episode.actions)
        assert len(episode.observations) == length + 1 == len(episode.rewards) + 1
        planned = int(episode.observations[0, 0])
        assert np.array_equal(episode.observations[:, 0], planned - np.arange(length + 1))
        whole = length == planned
        assert whole or index == len(episodes) - 1
        assert (episode.terminated, episode.truncated) == (whole, not whole)


def test_roll_out_does_not_favour_short_episodes():
    lengths = []
    for seed in range(300):
        environments = [Countdown() for _ in range(8)]
        episodes = roll_out(Still(), environments, 40, np.random.SeedSequence(seed))
        lengths += [episode.observations[0, 0] for episode in episodes[:3]]
    # Whichever 3 of 8 end first would have a mean of about 2.4; all together have 4 +- 2.
    assert abs(np.mean(lengths) - 4) < 5 * 2 / np.sqrt(len(lengths))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Make a small Hopper dataset twice and with another seed, in three folders."""
    context = pytest.MonkeyPatch()
    found = []
    for seed in (0, 0, 1):
        context.setenv("MINARI_DATASETS_PATH", str(tmp_path_factory.mktemp("embedded")))
        assert make_embedded_dataset(HOPPER, steps=2000, seed=seed, progress=False)
        found.append(load_dataset(HOPPER))
    context.undo()
    return found


def test_embedded_dataset_is_a_function_of_its_seed(small):
    first, again, other = small
    for name in ("observations", "actions", "rewards", "offsets", "final_observations"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.observations, other.observations)


def test_embedded_dataset_is_the_recording_of_its_environment(small):
    """Replaying the actions of each episode from its start gives its observations and rewards."""
    episodes = small[0]
    assert episodes.num_steps == 2000
    assert np.abs(episodes.actions).max() <= 1
    environment = make_env("Hopper-v5")
    environment.reset(seed=0)
    model = environment.unwrapped
    for index in (0, 1, episodes.num_episodes - 1):
        start, stop = episodes.offsets[index], episodes.offsets[index + 1]
        first = episodes.observations[start].astype(np.float64)
        model.set_state(np.concatenate([[0.0], first[:5]]), first[5:])
        for row in range(start, min(start + 20, stop - 1)):
            observation, reward, *_ = environment.step(episodes.actions[row])
            assert np.abs(observation - episodes.observations[row + 1]).max() < 1e-2
            assert abs(reward - episodes.rewards[row]) < 1e-2
    environment.close()


def test_embedded_dataset_opens_in_minari_and_knows_its_scores(root):
    import minari

    assert make_embedded_dataset("minrl/halfcheetah/medium-replay-v0", steps=80, progress=False)
    dataset = minari.load_dataset("minrl/halfcheetah/medium-replay-v0")
    assert (dataset.total_steps, dataset.total_episodes) == (80, 8)  # one for each policy
    assert dataset.spec.env_spec.id == "HalfCheetah-v5"
    metadata = dataset.storage.metadata
    assert set(metadata["author"]) == {"minrl"}
    assert "not comparable with D4RL's tables" in metadata["description"]
    info = load_dataset("minrl/halfcheetah/medium-replay-v0").info
    assert (info.reference_min, info.reference_max) == REFERENCE_SCORES["halfcheetah"]
    assert info.score_note == "embedded minrl data on HalfCheetah-v5, D4RL reference scores"
    assert (info.environment_id, info.max_episode_steps) == ("HalfCheetah-v5", 1000)


def test_making_says_nothing_and_leaves_no_file_behind(tmp_path):
    script = (
        "from minrl.data.behaviours import make_embedded_dataset as make;"
        "make('minrl/halfcheetah/medium-v0', steps=50)"
    )
    environment = {"MINARI_DATASETS_PATH": str(tmp_path / "datasets"), "PATH": ""}
    (tmp_path / "work").mkdir()
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=tmp_path / "work",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list((tmp_path / "work").iterdir()) == []


def test_two_processes_make_the_same_dataset_once(tmp_path):
    script = (
        "from minrl.data.behaviours import make_embedded_dataset as make;"
        f"print(make({HOPPER!r}, steps=3000, progress=False))"
    )
    environment = {"MINARI_DATASETS_PATH": str(tmp_path), "PATH": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    answers = sorted(process.communicate(timeout=100)[0].strip() for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert answers == ["False", "True"]


def test_wrong_requests_are_refused(root):
    with pytest.raises(DatasetError, match="no embedded dataset; did you mean minrl/hopper/medium"):
        make_embedded_dataset("minrl/hopper/expert-v0")
    with pytest.raises(DatasetError, match=r"steps must be at least 2 for .*, got 1"):
        make_embedded_dataset("minrl/hopper/medium-expert-v0", steps=1)
    with pytest.raises(DatasetError, match="no behaviour policy 'hopper-best'; there are hopper"):
        BehaviourPolicy.load("hopper-best")
    assert list(root.glob("minrl/**/*")) == []


REPLAYS = {
    "hopper": [16, *range(100_000, 1_000_001, 100_000)],
    "halfcheetah": [*range(10_000, 150_001, 20_000)],
    "walker2d": [16, *range(200_000, 1_000_001, 200_000)],
}


@pytest.mark.parametrize("robot", REPLAYS)
def test_datasets_are_of_the_policies_that_their_names_say(robot):
    from minrl.data.behaviours import _segments

    steps = [f"{robot}-replay-{number:07}" for number in REPLAYS[robot]]
    assert _segments(f"minrl/{robot}/medium-v0") == [f"{robot}-medium"]
    assert _segments(f"minrl/{robot}/medium-expert-v0") == [f"{robot}-medium", f"{robot}-expert"]
    assert _segments(f"minrl/{robot}/medium-replay-v0") == steps


def test_half_of_medium_expert_is_of_the_expert_at_half_its_noise(root, monkeypatch):
    from minrl.data import behaviours

    recorded = []

    def note(policy, environments, steps, *rest):
        recorded.append((policy, steps))
        return roll_out(policy, environments, steps, *rest)

    monkeypatch.setattr(behaviours, "roll_out", note)
    make_embedded_dataset("minrl/hopper/medium-expert-v0", steps=41, progress=False)
    policies, steps = zip(*recorded, strict=True)
    assert steps == (21, 20)
    observations = np.random.default_rng(0).normal(size=(3, 11))
    for policy, name, scale in zip(policies, ("medium", "expert"), (1.0, 0.5), strict=True):
        expected = BehaviourPolicy.load(f"hopper-{name}", noise_scale=scale)
        actions = (one.act(observations, np.random.default_rng(7)) for one in (policy, expected))
        assert np.array_equal(*actions)


@pytest.mark.parametrize("name", ["hopper-medium", "halfcheetah-expert"])
def test_policy_follows_its_written_formula(name):
    from minrl.data.behaviours import _FOLDER

    weights = np.load(_FOLDER / f"{name}.npz", allow_pickle=False)
    observations = np.random.default_rng(0).normal(size=(5, weights["w0"].shape[1])) * 3
    found = BehaviourPolicy.load(name, noise_scale=0.5).act(observations, np.random.default_rng(7))
    noise = np.random.default_rng(7).standard_normal(found.shape, dtype=np.float32)
    for row in range(5):
        x = observations[row]
        if weights["squash"]:
            layer = lambda w, b, x: np.maximum(w @ x + b, 0)  # noqa: E731
        else:
            layer = lambda w, b, x: np.tanh(w @ x + b)  # noqa: E731
            x = np.clip((x - weights["obs_mean"]) / weights["obs_std"], -10, 10)
        x = layer(weights["w1"], weights["b1"], layer(weights["w0"], weights["b0"], x))
        mean = weights["w_mean"] @ x + weights["b_mean"]
        if weights["squash"]:
            log_std = np.clip(weights["w_log_std"] @ x + weights["b_log_std"], -20, 2)
            expected = np.tanh(mean + 0.5 * np.exp(log_std) * noise[row])
        else:
            expected = np.clip(mean + 0.5 * np.exp(weights["log_std"]) * noise[row], -1, 1)
        # In float32 256 terms are summed twice, in an order that depends on the processor.
        assert np.abs(found[row] - expected).max() < 1e-4
    assert found.dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "environment_id", "low", "high"),
    [  # the manifest's mean, and five standard errors of twenty episodes
        ("hopper-medium", "Hopper-v5", 1170, 1480),
        ("hopper-expert", "Hopper-v5", 2500, 3750),
        ("walker2d-medium", "Walker2d-v5", 1960, 4010),
        ("walker2d-expert", "Walker2d-v5", 4170, 6190),
        ("halfcheetah-medium", "HalfCheetah-v5", 4335, 4762),
        ("halfcheetah-expert", "HalfCheetah-v5", 9100, 9460),
    ],
)
def test_policies_return_what_the_manifest_says(name, environment_id, low, high):
    environments = [make_env(environment_id) for _ in range(16)]
    policy = BehaviourPolicy.load(name)
    episodes = roll_out(policy, environments, 20_000, np.random.SeedSequence(0))
    returns = [episode.rewards.sum() for episode in episodes[:-1]]
    for environment in environments:
        environment.close()
    assert low < np.mean(returns) < high


@pytest.mark.slow
@pytest.mark.parametrize("dataset_id", EMBEDDED_IDS)
def test_every_embedded_dataset_can_be_made(root, dataset_id):
    make_embedded_dataset(dataset_id, steps=3000, progress=False)
    assert load_dataset(dataset_id).num_steps == 3000
