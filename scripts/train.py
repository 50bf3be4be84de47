"""``minrl train``: the training loop, evaluation, and what a run leaves behind."""

import math
import warnings
from pathlib import Path

import numpy as np
import torch

from minrl.agents.devices import choose_device
from minrl.agents.fitting import check_count
from minrl.agents.training import Trainer
from minrl.data.episodes import Episodes
from minrl.errors import CheckpointError, ConfigError, DatasetError
from minrl.scripts.evaluate import EvaluateConfig, evaluate_run, plot_asked_against_got
from minrl.scripts.recorder import Recorder, circumstances, make_agent
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import TrainConfig
from minrl.scripts.train_processes import (
    distributed_processes,
    interruption,
    load_first_on_rank_zero,
)
from minrl.scripts.train_setup import build_model, complete, held_out_batches, make_sampler


def train(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """Train a trajectory model on offline data, evaluate it, and leave a run folder.

    Args:
        config: Every choice there is.
        resume: Folder of a run to go on with; what is given beside it must be as in that run,
            except steps, device and final-episodes.

    Returns:
        The run folder; None on the processes of ``torchrun`` that only compute.
    """
    config.check()
    if resume:
        config = RunFolder(resume).read_config().continued_with(config)
    with distributed_processes(config.device) as rank:
        episodes = load_first_on_rank_zero(config, rank)
        config = complete(config, episodes)
        training, held_out = episodes.split(config.held_out, config.seed)
        training = training.best(config.best_fraction)
        sampler = make_sampler(config, training)
        trainer = Trainer(
            build_model(config, training),
            config.optimization,
            total_steps=config.steps,
            seed=config.seed,
            device=choose_device(config.device),
        )
        make_agent(config, trainer, episodes.info)  # nothing is trained that could not act
        if rank != 0:  # the other processes of torchrun only compute
            if resume:
                restore(trainer, RunFolder(resume), episodes)
            while trainer.step_count < config.steps:
                trainer.step_from(sampler)
            return None
        run = RunFolder(resume) if resume else RunFolder.create(config)
        with run.locked():
            losses, is_evaluated = [], True
            if resume:
                losses, is_evaluated = go_on(run, config, trainer, episodes)
            describe(run, config, episodes, trainer)
            batches = held_out_batches(config, held_out) if config.held_out else []
            with run.metrics(trainer.step_count) as metrics, interruption() as asked:
                recorder = Recorder(run, metrics, config, trainer, episodes.info, batches, losses)
                try:
                    if not is_evaluated:  # stopped between saving and the end of the evaluation
                        recorder.evaluate()
                    while trainer.step_count < config.steps and not asked:
                        recorder.after_step(trainer.step_from(sampler))
                finally:  # done, stopped or failed: the weights of this moment are kept
                    recorder.close()
            if trainer.step_count < config.steps:
                print(f"stopped at step {trainer.step_count} and saved; to go on:")
                print(f"  minrl train --resume {run.path}")
            elif config.final_episodes and config.environment:
                evaluate_at_the_end(run, config, episodes)
    return run.path


def go_on(
    run: RunFolder, config: TrainConfig, trainer: Trainer, episodes: Episodes
) -> tuple[list[float], bool]:
    """Set the trainer to where a run was left, and make its folder ready to be written on.

    Returns:
        The losses not logged yet, and whether the newest checkpoint was evaluated.

    Raises:
        ConfigError: If the run is further already.
        CheckpointError, DatasetError: As :func:`restore`.
    """
    losses, step = restore(trainer, run, episodes), trainer.step_count
    if step > config.steps:
        raise ConfigError(
            f"{run.path} is at step {step} already: steps must be at least that, not {config.steps}"
        )
    is_evaluated = run.was_evaluated(config, step)
    run.write_json("config.json", config.to_json())
    run.forget_after(step, evaluated=is_evaluated)
    return losses, is_evaluated


def evaluate_at_the_end(run: RunFolder, config: TrainConfig, episodes: Episodes) -> None:
    """Print and write down what the trained agent gets, for what it is asked for."""
    evaluate_run(run.path, EvaluateConfig(episodes=config.final_episodes))
    lowest = float(np.quantile(episodes.returns, 0.05))
    plot_asked_against_got(run.path, lowest=lowest)


def restore(trainer: Trainer, run: RunFolder, episodes: Episodes) -> list[float]:
    """Set the trainer to the last sound checkpoint, if the run came to one.

    Returns:
        The losses not logged yet.

    Raises:
        CheckpointError: If there is no sound checkpoint, or it does not fit.
        DatasetError: If the data has changed since.
    """
    if not run.checkpoints.steps():
        print(f"there is no checkpoint in {run.path} yet: training starts again")
        return []
    step = run.checkpoints.last()
    dataset = run.checkpoints.header(step).get("dataset")
    trained_on = dataset.get("sha256") if isinstance(dataset, dict) else None
    if not isinstance(trained_on, str):
        raise CheckpointError(f"checkpoint {step} of {run.path} does not say what data it is from")
    if trained_on != episodes.info.sha256:
        raise DatasetError(
            f"{episodes.info.dataset_id} is not the data this run was trained on: its SHA-256 is "
            f"{episodes.info.sha256[:12]}..., not {trained_on[:12]}..."
        )
    state = run.checkpoints.trainer_state(step)
    try:
        losses = _losses_since_the_last_line(state["losses"], state["skipped"], step)
        trainer.load_state_dict(state["trainer"])
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {step} of {run.path} does not fit: {error}") from error
    for name, now in circumstances(trainer).items():
        before = f"{state.get(name, now)}"
        if before != f"{now}":
            warnings.warn(
                f"this run was trained with {name} {before}, now it is {now}: it goes on, but "
                "not bit for bit as it would have",
                stacklevel=2,
            )
    return losses


def _losses_since_the_last_line(losses: torch.Tensor, skipped: int, step: int) -> list[float]:
    """Return the losses of the steps since the last line of metrics, NaN for those skipped."""
    check_count("the number of skipped steps", skipped)
    if losses.dim() != 1 or losses.dtype != torch.float64 or len(losses) + skipped > step:
        raise ValueError(f"there are other losses than those of {step} steps")
    return losses.tolist() + [math.nan] * skipped


def describe(run: RunFolder, config: TrainConfig, episodes: Episodes, trainer: Trainer) -> None:
    """Print what is about to be trained, on what, and where it goes."""
    info, model = episodes.info, trainer.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"data   {info.dataset_id}: {episodes.num_episodes} episodes, {episodes.num_steps} steps")
    print(f"model  {model.config.backbone}, {parameters:,} parameters, on {trainer.device}")
    print(f"run    {run.path}")
    if ignored := config.without_effect():
        warnings.warn(
            f"of no effect with {model.config.backbone}: {', '.join(ignored)}", stacklevel=2
        )
    tells_order = model.embed_timestep is not None or model.config.convolution
    if model.config.backbone == "transformer" and not tells_order:
        warnings.warn(
            "a transformer without timesteps (max-timestep) cannot tell the order of what it sees",
            stacklevel=2,
        )
