"""``minrl train``: data, model, the training loop, evaluation, and what a run leaves behind."""

import contextlib
import dataclasses
import math
import os
import signal
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import numpy as np
import torch
import torch.distributed as dist

from minrl.agents.devices import choose_device
from minrl.agents.fitting import check_count
from minrl.agents.model_config import DEFAULT_RETURN_SCALE
from minrl.agents.training import Trainer
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.episodes import Episodes
from minrl.data.minari_source import load_dataset
from minrl.data.windows import Batch, WindowSampler
from minrl.errors import CheckpointError, ConfigError, DatasetError, EnvError
from minrl.scripts.evaluate import (
    EvaluateConfig,
    check_environment,
    evaluate_run,
    plot_asked_against_got,
)
from minrl.scripts.match_parameters import match_width
from minrl.scripts.recorder import Recorder, circumstances, make_agent
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import TrainConfig, task_of

HELD_OUT_BATCHES = 8


def train(config: TrainConfig, resume: Path | None = None) -> Path | None:
    """Train a trajectory model on offline data, evaluate it, and leave a run folder.

    Args:
        config: Every choice there is.
        resume: Folder of a run to go on with; flags given beside it must be those of the run,
            except steps, device and final-episodes.

    Returns:
        The run folder; None on the processes of ``torchrun`` that only compute.
    """
    config.check()
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
            losses, unevaluated = [], False
            if resume:
                losses = restore(trainer, run, episodes)
                if trainer.step_count > config.steps:
                    raise ConfigError(
                        f"{run.path} is at step {trainer.step_count} already: steps must be at "
                        f"least that, not {config.steps}"
                    )
                unevaluated = not run.was_evaluated(config, trainer.step_count)
                continue_run(run, config, trainer.step_count, evaluated=not unevaluated)
            describe(run, config, episodes, trainer)
            with run.metrics(trainer.step_count) as metrics, interruption() as asked:
                batches = held_out_batches(config, held_out) if config.held_out else []
                recorder = Recorder(run, metrics, config, trainer, episodes.info, batches, losses)
                try:
                    if unevaluated:  # stopped between saving and the end of the evaluation
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


def evaluate_at_the_end(run: RunFolder, config: TrainConfig, episodes: Episodes) -> None:
    """Print and write down what the trained agent gets, for what it is asked for."""
    evaluate_run(run.path, EvaluateConfig(episodes=config.final_episodes))
    lowest = float(np.quantile(episodes.returns, 0.05))
    plot_asked_against_got(run.path, lowest=lowest)


def complete(config: TrainConfig, episodes: Episodes) -> TrainConfig:
    """Return the configuration with what the data decides filled in.

    Raises:
        EnvError: If the environment is unknown or not supported.
        ConfigError: If it is not the one the data is from.
    """
    recorded_in = episodes.info.environment_id
    name = config.environment or recorded_in
    sizes = episodes.observations.shape[1], episodes.actions.shape[1]
    if name is not None and (config.eval_episodes or config.final_episodes):
        try:
            check_environment(name, sizes, recorded_in, "the data")
        except EnvError as error:
            unplayed = "to train without playing, --eval-episodes 0 --final-episodes 0"
            raise EnvError(f"{error}; {unplayed}") from error
    if config.context > episodes.lengths.max():
        raise ConfigError(
            f"context must be from 1 to {episodes.lengths.max()}, the longest episode of "
            f"{episodes.info.dataset_id}, not {config.context}: give --context"
        )
    targets = config.targets or choose_targets(episodes)
    model = config.model
    if model.attention_context is None and model.backbone == "transformer":
        model = dataclasses.replace(model, attention_context=config.burn_in + config.context)
    if config.match_parameters is not None:
        width = match_width(model, *sizes, config.match_parameters)
        model = dataclasses.replace(model, width=width)
    if model.return_scale is None:
        largest = float(np.abs(episodes.returns_of_steps(model.condition)).max())
        scale = DEFAULT_RETURN_SCALE if task_of(name or "")[0] else max(largest, 1e-6)
        model = dataclasses.replace(model, return_scale=scale)
    return dataclasses.replace(config, environment=name, targets=tuple(targets), model=model)


def choose_targets(episodes: Episodes) -> tuple[float, ...]:
    """Return what to ask for: the mean return of the best tenth of the data, and of all of it.

    Both are weighted by steps, since that is how often training sees them, and rounded to three
    digits. More than the data holds makes agents worse (results/settings.md, "What to ask for").
    """
    parts = (episodes.best(0.1), episodes)
    means = (np.average(part.returns, weights=part.lengths) for part in parts)
    return tuple(dict.fromkeys(float(f"{mean:.3g}") for mean in means))


def build_model(config: TrainConfig, episodes: Episodes) -> TrajectoryModel:
    """Return a new model with the normalisation and action bounds of the data."""
    torch.manual_seed(config.seed)
    observations = episodes.observations
    model = TrajectoryModel(observations.shape[1], episodes.actions.shape[1], config.model)
    mean, std = observations.mean(0, dtype="float64"), observations.std(0, dtype="float64")
    # What is constant in the data, as far as float32 can tell, stays as it is: divided by next to
    # nothing, any other value would drown the rest. The Decision Transformer's 1e-6 is left out
    # where it would count.
    std[std <= np.maximum(1e-7 * np.abs(mean), 1e-30)] = 1.0
    model.observation_mean.copy_(torch.from_numpy(mean))
    model.observation_std.copy_(torch.from_numpy(np.where(std < 1e-3, std, std + 1e-6)))
    wanted_low, wanted_high = choose_bounds(episodes)
    # Rounded inwards: the nearest float32 may be outside of a float64 bound.
    low, high = np.float32(wanted_low), np.float32(wanted_high)
    low = np.where(low < wanted_low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > wanted_high, np.nextafter(high, np.float32(-np.inf)), high)
    model.action_low.copy_(torch.from_numpy(low))
    model.action_high.copy_(torch.from_numpy(high))
    return model


def choose_bounds(episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds of what an agent does, (A,) each: those of the actions.

    Where the data fills less than a hundredth of them, what it fills: the model's outputs are in
    proportion to the bounds, so that it could not tell such actions apart.
    """
    low, high = np.float64(episodes.info.action_low), np.float64(episodes.info.action_high)
    least, most = (np.float64(f(episodes.actions, axis=0)) for f in (np.min, np.max))
    narrow = (least < most) & (most - least < high / 100 - low / 100)
    if narrow.any():
        which = ", ".join(map(str, np.flatnonzero(narrow)))
        warnings.warn(
            f"the data uses less than a hundredth of the bounds of action {which}: the agent will "
            "stay within what the data uses",
            stacklevel=3,
        )
    return np.where(narrow, least, low), np.where(narrow, most, high)


def make_sampler(config: TrainConfig, episodes: Episodes) -> WindowSampler:
    """Return the sampler of windows, no longer than the longest of these episodes."""
    return WindowSampler(
        episodes,
        context=min(config.context, int(episodes.lengths.max())),
        batch_size=config.batch_size,
        seed=config.seed,
        burn_in=config.burn_in,
        condition=config.model.condition,
    )


def held_out_batches(config: TrainConfig, episodes: Episodes) -> list[Batch]:
    """Return the same windows of held-out episodes for every evaluation of a run."""
    sampler = make_sampler(config, episodes)
    return [sampler.batch(step) for step in range(HELD_OUT_BATCHES)]


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


def continue_run(run: RunFolder, config: TrainConfig, step: int, *, evaluated: bool) -> None:
    """Make a run's folder ready to be written on from a step, whose evaluation may be missing."""
    run.write_json("config.json", config.to_json())
    run.forget_after(step, evaluated=evaluated)


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


def load_first_on_rank_zero(config: TrainConfig, rank: int) -> Episodes:
    """Load the data, on one process before the others, since that may mean to make it."""
    if rank != 0:
        dist.barrier()
    episodes = load_dataset(config.dataset, on_bad_episode=config.on_bad_episode)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return episodes


@contextlib.contextmanager
def distributed_processes(device: str) -> Iterator[int]:
    """Join the other processes if ``torchrun`` started this one; give this one's rank."""
    if not dist.is_torchelastic_launched():
        yield 0
        return
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # The others wait while the first makes the data and evaluates; torchrun ends them if it dies.
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def interruption() -> Iterator[list[int]]:
    """Give a list that becomes true at Ctrl-C or SIGTERM; Ctrl-C after that interrupts at once.

    SIGTERM may come more than once, from a supervisor and from whoever started this: the second is
    no reason to give up what the first asked for.

    Disabled under ``torchrun``, whose processes would stop at different steps.
    """
    asked: list[int] = []
    if dist.is_initialized():
        yield asked
        return

    def remember(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, remember)
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
