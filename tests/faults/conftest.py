import gymnasium
import numpy as np
import pytest
from faulty_environment import BAD_EPISODE
from processes import children

from minrl.agents.checkpoint import load_weights
from minrl.data.episodes import Episode
from minrl.data.minari_writer import DatasetCard, write_dataset
from minrl.scripts.run_folder import RunFolder

SMALL = (
    "--width 16 --num-layers 1 --dropout 0.1 --ema-decay 0.9 --batch-size 8 --context 10 "
    "--steps 24 --eval-every 4 --log-every 3 --eval-episodes 1 --final-episodes 0 "
    "--targets=-300 --device cpu"
)


@pytest.fixture(scope="session")
def pendulum_id(datasets_path):
    """The id of a tiny dataset of an environment that is quick to simulate."""
    environment = gymnasium.make("Pendulum-v1")
    environment.action_space.seed(0)
    episodes = []
    for seed in range(8):
        observations, actions, rewards = [environment.reset(seed=seed)[0]], [], []
        for _ in range(30):
            actions.append(environment.action_space.sample())
            observation, reward, *_ = environment.step(actions[-1])
            observations.append(observation)
            rewards.append(reward)
        episodes.append(
            Episode(np.array(observations), np.array(actions), np.array(rewards), False, True)
        )
    card = DatasetCard(
        dataset_id="test/pendulum/random-v0",
        environment_id="Pendulum-v1",
        observation_space=environment.observation_space,
        action_space=environment.action_space,
        algorithm_name="random",
        description="made by a test",
    )
    environment.close()
    write_dataset(card, episodes)
    return card.dataset_id


@pytest.fixture(scope="session")
def train_arguments(pendulum_id):
    """Return a function that gives the arguments that begin or continue a small run."""

    def arguments(path, *more):
        if (path / "config.json").exists():
            return ("train", "--resume", str(path), *more)
        return ("train", "--dataset", pendulum_id, *SMALL.split(), "--run-dir", str(path), *more)

    return arguments


@pytest.fixture(scope="session")
def contents_of():
    """Return a function that gives all that must be equal in two runs."""

    def contents(path):
        run = RunFolder(path)
        step = run.checkpoints.last()
        rows = [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in run.read_metrics()
        ]
        scores = {step: run.checkpoints.header(step)["score"] for step in run.checkpoints.steps()}
        return {
            "step": step,
            "state": run.checkpoints.trainer_state(step),
            "weights": load_weights(run.checkpoints.weights(step))[0],
            "metrics": rows,
            "scores": scores,
        }

    return contents


@pytest.fixture(scope="session")
def assert_equal():
    """Return a function that compares nested dicts and lists, tensors bit for bit."""
    import torch

    def compare(found, expected, name=""):
        if isinstance(expected, dict):
            assert found.keys() == expected.keys(), name
            for key, value in expected.items():
                compare(found[key], value, f"{name}.{key}")
        elif isinstance(expected, list):
            assert len(found) == len(expected), name
            for index, value in enumerate(expected):
                compare(found[index], value, f"{name}.{index}")
        elif isinstance(expected, torch.Tensor):
            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name
        else:
            assert found == expected, name

    return compare


@pytest.fixture
def new_children():
    """Return what lists the child processes that the test has added."""
    before = children()
    return lambda: children() - before


@pytest.fixture
def faulty():
    """Register an environment with a fault and return its id."""

    def register(**options):
        gymnasium.register(
            "Faulty-v0",
            entry_point="faulty_environment:Faulty",
            max_episode_steps=100,
            kwargs={"episode": BAD_EPISODE, **options},
        )
        return "Faulty-v0"

    yield register
    gymnasium.registry.pop("Faulty-v0", None)
