"""Other people's agents on the same data and evaluation: d3rlpy's DT, TD3+BC, IQL and BC.

    python -m minrl.scripts.examples.peers --algorithm td3bc --dataset minrl/hopper/medium-v0

An outside yardstick: the agents are d3rlpy's own, untouched, with the settings of its scripts of
published results (github.com/takuseno/d3rlpy, reproductions/offline, version 2.8.1) and, unless
``--steps`` says otherwise, their budget of steps. What is ours is the way in and the way out: the
episodes that ``minrl train`` trains on become d3rlpy's, and its agents act in the episodes that
``minrl train`` is evaluated on at the end. Leaves one peer.json, which ``minrl report`` reads.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from tqdm.auto import tqdm

from minrl.agents.adapters.libraries import interface_of
from minrl.agents.devices import choose_device
from minrl.agents.files import write_atomically
from minrl.data.episodes import Episodes
from minrl.data.minari_source import load_dataset
from minrl.envs.evaluation import format_return
from minrl.envs.rollout import Policy, evaluate
from minrl.errors import ConfigError, MinrlError
from minrl.scripts.examples.d3rlpy_agents import (
    INSTALL,
    MemorylessPolicy,
    TransformerPolicy,
    make_replay_buffer,
)
from minrl.scripts.imports import import_named
from minrl.scripts.train_config import DEFAULT_DATASET, PRESETS, TrainConfig
from minrl.scripts.train_setup import complete

with interface_of("d3rlpy", install=INSTALL, known="2.8.1"):
    import d3rlpy
    import structlog
    from d3rlpy.algos import BCConfig, DecisionTransformerConfig, IQLConfig, TD3PlusBCConfig
    from d3rlpy.logging import NoopAdapterFactory
    from d3rlpy.models import VectorEncoderFactory
    from d3rlpy.optimizers import (
        AdamFactory,
        AdamWFactory,
        CosineAnnealingLRFactory,
        WarmupSchedulerFactory,
    )
    from d3rlpy.preprocessing import (
        MultiplyRewardScaler,
        ReturnBasedRewardScaler,
        StandardObservationScaler,
    )

STEPS_PER_EPOCH = 1000  # as in d3rlpy's scripts; it decides only when d3rlpy sums up its metrics


def configure_decision_transformer(steps: int) -> DecisionTransformerConfig:
    """Return the configuration of reproductions/offline/decision_transformer.py."""
    warmup = WarmupSchedulerFactory(warmup_steps=max(1, steps // 10))
    return DecisionTransformerConfig(
        batch_size=64,
        learning_rate=1e-4,
        optim_factory=AdamWFactory(
            weight_decay=1e-4, clip_grad_norm=0.25, lr_scheduler_factory=warmup
        ),
        encoder_factory=VectorEncoderFactory([128], exclude_last_activation=True),
        observation_scaler=StandardObservationScaler(),
        reward_scaler=MultiplyRewardScaler(0.001),
        position_encoding_type=d3rlpy.PositionEncodingType.SIMPLE,
        context_size=20,
        num_heads=1,
        num_layers=3,
        max_timestep=1000,
    )


def configure_td3_bc(steps: int) -> TD3PlusBCConfig:
    """Return the configuration of reproductions/offline/td3_plus_bc.py."""
    return TD3PlusBCConfig(
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        batch_size=256,
        target_smoothing_sigma=0.2,
        target_smoothing_clip=0.5,
        alpha=2.5,
        update_actor_interval=2,
        observation_scaler=StandardObservationScaler(),
    )


def configure_iql(steps: int) -> IQLConfig:
    """Return the configuration of reproductions/offline/iql.py."""
    decay = CosineAnnealingLRFactory(T_max=steps)
    return IQLConfig(
        actor_learning_rate=3e-4,
        critic_learning_rate=3e-4,
        actor_optim_factory=AdamFactory(lr_scheduler_factory=decay),
        batch_size=256,
        weight_temp=3.0,
        max_weight=100.0,
        expectile=0.7,
        reward_scaler=ReturnBasedRewardScaler(multiplier=1000.0),
    )


def configure_bc(steps: int) -> BCConfig:
    """Return d3rlpy's defaults; it has no script for behaviour cloning."""
    return BCConfig()


class Peer(NamedTuple):
    """An agent of d3rlpy.

    Attributes:
        name: Shown in tables.
        configure: From the steps it will be trained for, which its schedules are stretched over;
            with the budget they are d3rlpy's own.
        budget: Steps in d3rlpy's script; of behaviour cloning, as many as of the others.
        settings: Where the rest of its settings is from.
        network: Of its modules, the one that acts.
        make_policy: What acts with it.
        takes_return: Whether it is asked for a return.
    """

    name: str
    configure: Callable[[int], Any]
    budget: int
    settings: str
    network: str
    make_policy: Callable[[Any], Policy] = MemorylessPolicy
    takes_return: bool = False


PEERS = {
    "bc": Peer("BC", configure_bc, 500_000, "defaults (there is no script of its)", "imitator"),
    "dt": Peer(
        "DT",
        configure_decision_transformer,
        100_000,
        "settings of reproductions/offline/decision_transformer.py",
        "transformer",
        TransformerPolicy,
        takes_return=True,
    ),
    "iql": Peer(
        "IQL", configure_iql, 500_000, "settings of reproductions/offline/iql.py", "policy"
    ),
    "td3bc": Peer(
        "TD3+BC",
        configure_td3_bc,
        500_000,
        "settings of reproductions/offline/td3_plus_bc.py",
        "policy",
    ),
}


@dataclass(frozen=True)
class Settings:
    """What to train, on what data, and for how long.

    Args:
        algorithm: Of d3rlpy.
        dataset: Minari ids; several are joined.
        preset: Of the runs it is compared with; it decides on what episodes it is trained and
            which returns it is asked for.
        held_out: Share of the episodes kept from training, if not that of the preset.
        targets: Returns to ask dt for, if not those of the preset.
        on_bad_episode: As in minrl train: raise, or drop.
        seed: Of weights, batches, held-out episodes and evaluation.
        steps: Training steps; by default what d3rlpy's script takes.
        episodes: For each target at the end.
        device: cpu, cuda ...; auto: a GPU if there is one.
        output: Folder for peer.json and d3rlpy's own model.d3; by default
            runs/DATASET/d3rlpy-ALGORITHM-sSEED.
    """

    algorithm: Literal["bc", "dt", "iql", "td3bc"] = "td3bc"
    dataset: tuple[str, ...] = (DEFAULT_DATASET,)
    preset: Literal["quick", "paper"] = "quick"
    held_out: float | None = None
    targets: tuple[float, ...] = ()
    on_bad_episode: Literal["raise", "drop"] = "raise"
    seed: int = 0
    steps: int | None = None
    episodes: int = 100
    device: str = "auto"
    output: Path | None = None


def train(peer: Peer, episodes: Episodes, steps: int, seed: int, device: torch.device) -> Any:
    """Return the algorithm, trained by d3rlpy's own loop."""
    d3rlpy.seed(seed)
    algorithm = peer.configure(steps).create(f"{device.type}:{device.index or 0}")
    with tqdm(total=steps, unit="step", desc=f"d3rlpy {peer.name}", mininterval=1.0) as bar:
        algorithm.fit(
            make_replay_buffer(episodes),
            n_steps=steps,
            n_steps_per_epoch=min(steps, STEPS_PER_EPOCH),
            logger_adapter=NoopAdapterFactory(),
            show_progress=False,
            callback=lambda *_: bar.update(),
        )
    return algorithm


def evaluate_as_minrl_train(
    policy: Policy, config: TrainConfig, episodes: Episodes, targets: tuple[float | None, ...]
) -> list[dict]:
    """Evaluate like ``minrl train`` at its end: start states, targets, references of the score.

    Args:
        policy: Acts.
        config: Complete.
        episodes: The data, which says what scores 0 and 100.
        targets: Returns to ask for.
    """
    lines = []
    for target in targets:
        with tqdm(total=config.final_episodes, unit="episode", leave=False) as bar:
            evaluation = evaluate(
                policy,
                config.environment,
                episodes=config.final_episodes,
                target_return=target,
                seed=config.final_seed,
                references=episodes.info.references,
                on_episode=lambda *_, bar=bar: bar.update(),
            )
        asked = "" if target is None else f" asked for {target:g}"
        score = f", score {evaluation.normalized['mean']:.1f} %" if evaluation.normalized else ""
        mean, std = map(format_return, (evaluation.return_mean, evaluation.return_std))
        print(f"return{asked}: {mean} ± {std}{score}")
        lines.append({"checkpoint": "last", "step": config.steps, **evaluation.to_dict()})
    return lines


def complete_settings(settings: Settings, episodes: Episodes) -> TrainConfig:
    """Return what ``minrl train`` would do on this data with this seed.

    Raises:
        ConfigError: If d3rlpy cannot train so many steps or act within the bounds of the actions,
            or there are no episodes to play or no environment to play them in.
    """
    steps = PEERS[settings.algorithm].budget if settings.steps is None else settings.steps
    if steps < 1 or steps % min(steps, STEPS_PER_EPOCH):
        raise ConfigError(
            f"steps must be less than {STEPS_PER_EPOCH} or a multiple of it, not {steps}: d3rlpy "
            "trains whole epochs"
        )
    if settings.episodes < 1:
        raise ConfigError(f"episodes must be at least 1, not {settings.episodes}")
    bounds = {*episodes.info.action_low, *(-high for high in episodes.info.action_high)}
    if bounds != {-1.0}:
        raise ConfigError(
            f"actions of {episodes.info.dataset_id} are not from -1 to 1, as those of d3rlpy's "
            "agents are"
        )
    usual = PRESETS[settings.preset](settings.dataset)
    config = dataclasses.replace(
        usual,
        seed=settings.seed,
        steps=steps,
        final_episodes=settings.episodes,
        held_out=usual.held_out if settings.held_out is None else settings.held_out,
        targets=settings.targets or usual.targets,
    )
    config.check()
    config = complete(config, episodes)
    if config.environment is None:
        raise ConfigError(f"{episodes.info.dataset_id} names no environment to act in")
    return config


def describe(peer: Peer, config: TrainConfig) -> str:
    """Return what a reader of the result must know."""
    budget = "its whole budget" if config.steps == peer.budget else f"{peer.budget:,} asked for"
    return (
        f"d3rlpy's code and {peer.settings}; {config.steps:,} steps, {budget}; schedules of the "
        f"learning rate stretched over these; trained on {1 - config.held_out:.0%} of the "
        "episodes, those that minrl train trains on; parameters are those of the acting network"
    )


def main(settings: Settings) -> dict:
    """Train, write model.d3, evaluate, write peer.json.

    Raises:
        ConfigError: If the output is there already, or as :func:`complete_settings`.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    peer = PEERS[settings.algorithm]
    name = f"d3rlpy-{settings.algorithm}-s{settings.seed}"
    output = settings.output or Path("runs", "+".join(settings.dataset), name)
    if (output / "peer.json").exists():
        raise ConfigError(f"output {output} has a peer.json already: choose another")
    episodes = load_dataset(settings.dataset, on_bad_episode=settings.on_bad_episode)
    config = complete_settings(settings, episodes)
    training, _ = episodes.split(config.held_out, config.seed)
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    algorithm = train(peer, training, config.steps, config.seed, choose_device(settings.device))
    seconds = time.perf_counter() - started
    algorithm.save(str(output / "model.d3"))  # d3rlpy.load_learnable takes it, whatever follows
    targets = config.targets if peer.takes_return else (None,)
    network = getattr(algorithm.impl.modules, peer.network)
    result = {
        "method": f"d3rlpy {peer.name}",
        "library": f"d3rlpy {d3rlpy.__version__}",
        "dataset": list(settings.dataset),
        "data": episodes.info.sha256,
        "seed": config.seed,
        "steps": config.steps,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "note": describe(peer, config),
        "evaluations": evaluate_as_minrl_train(
            peer.make_policy(algorithm), config, episodes, targets
        ),
    }
    write_atomically(output / "peer.json", (json.dumps(result) + "\n").encode())
    return result


if __name__ == "__main__":
    try:
        import_named()
        main(tyro.cli(Settings))
    except MinrlError as error:
        raise SystemExit(f"peers: error: {error}") from None
