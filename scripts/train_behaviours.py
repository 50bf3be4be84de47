"""Train behaviour policies online, as those in ``data/policies`` were (extra: ``behaviours``).

Run: ``python -m minrl.scripts.train_behaviours --environment hopper --out policies``. The policy
files and the ``manifest.json`` that come out are of the form that ``data/policies`` has and
``minrl.data.behaviours`` reads. Hopper and Walker2d learn with PPO of stable-baselines3,
HalfCheetah with SAC of sbx-rl. The shipped ones are from 4M steps of Hopper, the first 4M of 8M of
Walker2d (which matters to the learning rate only) and 600k of HalfCheetah; which of a run's
policies ship was chosen by hand, so that its own manifest lists others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minrl.data.behaviours import BehaviourPolicy
from minrl.envs.evaluation import Evaluation, format_return
from minrl.envs.make import make_env
from minrl.envs.rollout import evaluate
from minrl.errors import ConfigError, MinrlError

MEASURE_SEED, MEASURE_EPISODES = 777, 20
EXPERT_NOISE_SCALE = 0.5
REPLAY_BEYOND_MEDIUM = 1.6  # a replay buffer's best episodes are better than the last policy's mean
PPO_ENVIRONMENTS = 16


@dataclass(frozen=True)
class Task:
    """What is learned, how, and which mean return counts as medium (near D4RL's)."""

    environment_id: str
    algorithm: Literal["PPO", "SAC"]
    steps: int
    snapshot_every: int
    medium_return: float


TASKS = {
    "hopper": Task("Hopper-v5", "PPO", 4_000_000, 100_000, 1300.0),
    "walker2d": Task("Walker2d-v5", "PPO", 4_000_000, 200_000, 2850.0),
    "halfcheetah": Task("HalfCheetah-v5", "SAC", 600_000, 10_000, 4500.0),
}


@dataclass(frozen=True)
class BehaviourConfig:
    """What to train and where to put it.

    Attributes:
        environment: The task.
        out: Folder for the policy files and the manifest; made if it does not exist.
        steps: Environment steps; by default as many as the shipped policies come from.
        snapshot_every: Steps from one saved policy to the next; by default a fraction of ``steps``
            that suits the task.
        seed: Seed of the training.
    """

    environment: Literal["hopper", "walker2d", "halfcheetah"] = "hopper"
    out: Path = Path("policies")
    steps: int | None = None
    snapshot_every: int | None = None
    seed: int = 0


class MeanAndNoise:
    """Lets `evaluate` play a behaviour policy, which has no memory and takes no target."""

    def __init__(self, weights: dict[str, np.ndarray], noise_scale: float) -> None:
        self._policy = BehaviourPolicy(weights, noise_scale)
        self._generator = np.random.default_rng(MEASURE_SEED)

    def reset(self, mask: np.ndarray | None = None, **_: Any) -> None:
        """Do nothing: the policy carries nothing from step to step."""

    def act(self, observations: np.ndarray, rewards: np.ndarray | None = None) -> np.ndarray:
        """Sample actions (B, A) for observations (B, O)."""
        return self._policy.act(observations, self._generator)


def measure(weights: dict[str, np.ndarray], environment_id: str, noise_scale: float) -> Evaluation:
    """Play a policy for the episodes that the manifest reports."""
    agent = MeanAndNoise(weights, noise_scale)
    return evaluate(agent, environment_id, episodes=MEASURE_EPISODES, seed=MEASURE_SEED)


def export_ppo(model: Any) -> dict[str, np.ndarray]:
    """Return the actor of a PPO model with its observation statistics, as a policy file has them.

    Args:
        model: stable-baselines3 PPO with two tanh layers, in a VecNormalize.
    """
    policy, normalizer = model.policy, model.get_vec_normalize_env()
    first, _, second, _ = policy.mlp_extractor.policy_net
    layers = {"0": first, "1": second, "_mean": policy.action_net}
    weights = {}
    for suffix, layer in layers.items():
        weights[f"w{suffix}"] = layer.weight.detach().cpu().numpy().copy()
        weights[f"b{suffix}"] = layer.bias.detach().cpu().numpy().copy()
    statistics = normalizer.obs_rms
    return weights | {
        "log_std": policy.log_std.detach().cpu().numpy().copy(),
        "obs_mean": statistics.mean.astype(np.float32),
        "obs_std": np.sqrt(statistics.var + normalizer.epsilon).astype(np.float32),
        "activation": np.array("tanh"),
        "squash": np.array(False),
        "steps": np.array(model.num_timesteps),
    }


def export_sac(model: Any) -> dict[str, np.ndarray]:
    """Return the actor of a SAC model as a policy file has it.

    Args:
        model: sbx SAC with two ReLU layers; Flax keeps its weights as (in, out).
    """
    parameters = model.policy.actor_state.params["params"]
    weights = {}
    for suffix, name in (("0", "0"), ("1", "1"), ("_mean", "2"), ("_log_std", "3")):
        layer = parameters[f"Dense_{name}"]
        weights[f"w{suffix}"] = np.array(layer["kernel"], dtype=np.float32).T.copy()
        weights[f"b{suffix}"] = np.array(layer["bias"], dtype=np.float32)
    size = model.observation_space.shape
    return weights | {
        "obs_mean": np.zeros(size, np.float32),
        "obs_std": np.ones(size, np.float32),
        "activation": np.array("relu"),
        "squash": np.array(True),
        "steps": np.array(model.num_timesteps),
    }


def make_ppo(environment_id: str, seed: int) -> Any:
    """Make the PPO learner of Hopper and Walker2d."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    environments = DummyVecEnv([lambda: make_env(environment_id)] * PPO_ENVIRONMENTS)
    return PPO(
        "MlpPolicy",
        VecNormalize(environments),  # observations and rewards, clipped at 10
        n_steps=256,
        batch_size=512,
        n_epochs=10,
        learning_rate=lambda remaining: 3e-4 * (0.05 + 0.95 * remaining),
        gamma=0.99,
        gae_lambda=0.95,
        clip_range=0.2,
        ent_coef=0.0,
        max_grad_norm=0.5,
        policy_kwargs={"net_arch": [64, 64], "log_std_init": -0.5},
        seed=seed,
        device="cpu",
    )


def make_sac(environment_id: str, seed: int) -> Any:
    """Make the SAC learner of HalfCheetah."""
    from sbx import SAC

    return SAC(
        "MlpPolicy",
        make_env(environment_id),
        learning_starts=10_000,
        policy_kwargs={"net_arch": {"pi": [128, 128], "qf": [256, 256]}},
        seed=seed,
    )


def make_learner(task: Task, seed: int) -> tuple[Any, Callable[[Any], dict]]:
    """Return the learner of a task and the function that exports its actor.

    Raises:
        ConfigError: the package it needs is not installed.
    """
    try:
        if task.algorithm == "PPO":
            return make_ppo(task.environment_id, seed), export_ppo
        return make_sac(task.environment_id, seed), export_sac
    except ImportError as error:
        raise ConfigError(
            f"training behaviours needs {error.name}: pip install stable-baselines3 sbx-rl"
        ) from error


def write_manifest(folder: Path, environment: str, snapshots: list[dict]) -> None:
    """Sort snapshots into medium, expert and replay, and record them in the folder's manifest.

    Medium is the first policy that reaches the task's medium return (the best one if none does),
    expert the last policy with less noise, replay the ladder to a little beyond medium.
    """
    task = TASKS[environment]
    reached = [shot for shot in snapshots if shot["return_mean"] >= task.medium_return]
    medium = reached[0] if reached else max(snapshots, key=lambda shot: shot["return_mean"])
    last = snapshots[-1]
    names = {"medium": medium["file"], "expert": last["file"]}
    for level, source in names.items():
        shutil.copyfile(folder / source, folder / f"{environment}-{level}.npz")
    with np.load(folder / last["file"], allow_pickle=False) as file:
        expert = measure(dict(file), task.environment_id, EXPERT_NOISE_SCALE)
    end = REPLAY_BEYOND_MEDIUM * medium["training_steps"]
    levels = {
        "medium": [medium | {"file": f"{environment}-medium.npz"}],
        "expert": [
            describe(
                f"{environment}-expert.npz", last["training_steps"], EXPERT_NOISE_SCALE, expert
            )
        ],
        "replay": [shot for shot in snapshots if shot["training_steps"] <= end],
    }
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) if path.exists() else {}
    manifest[environment] = {
        "env": task.environment_id,
        "algorithm": task.algorithm,
        "levels": levels,
    }
    path.write_text(json.dumps(manifest, indent=1) + "\n")


def describe(file: str, steps: int, noise_scale: float, result: Evaluation) -> dict[str, Any]:
    """Return a policy's entry in the manifest."""
    return {
        "file": file,
        "training_steps": steps,
        "noise_scale": noise_scale,
        "return_mean": round(result.return_mean, 1),
        "return_std": round(result.return_std, 1),
        "length_mean": round(result.length_mean, 1),
        "episodes": len(result.returns),
    }


def train_behaviours(config: BehaviourConfig) -> list[dict]:
    """Train one task's policy, saving and measuring it on the way; return the measurements.

    Interrupted, it still writes the manifest of what there is.

    Raises:
        ConfigError: the package that the learner needs is not installed.
    """
    task = TASKS[config.environment]
    steps, every = config.steps or task.steps, config.snapshot_every or task.snapshot_every
    learner, export = make_learner(task, config.seed)
    config.out.mkdir(parents=True, exist_ok=True)
    snapshots: list[dict] = []

    def take_snapshot() -> None:
        weights, done = export(learner), learner.num_timesteps
        file = f"{config.environment}-replay-{done:07d}.npz"
        np.savez_compressed(config.out / file, **weights)
        result = measure(weights, task.environment_id, 1.0)
        snapshots.append(describe(file, done, 1.0, result))
        mean, std = map(format_return, (result.return_mean, result.return_std))
        print(f"{file}: return {mean} ± {std}", flush=True)

    def after_step(_locals: dict[str, Any], _globals: dict[str, Any]) -> bool:
        if learner.num_timesteps >= every * len(snapshots):
            take_snapshot()
        return True  # go on

    try:
        learner.learn(steps, callback=after_step)
    except KeyboardInterrupt:
        print("interrupted: writing the manifest of what there is", flush=True)
    if not snapshots or snapshots[-1]["training_steps"] != learner.num_timesteps:
        take_snapshot()
    write_manifest(config.out, config.environment, snapshots)
    return snapshots


if __name__ == "__main__":
    import tyro

    try:
        train_behaviours(tyro.cli(BehaviourConfig, description=__doc__))
    except MinrlError as error:
        raise SystemExit(f"train_behaviours: error: {error}") from None
