"""What a configuration and its data make: the settings left open, model, windows and targets."""

import dataclasses
import warnings

import numpy as np
import torch

from minrl.agents.model_config import DEFAULT_RETURN_SCALE
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.episodes import Episodes
from minrl.data.windows import Batch, WindowSampler
from minrl.errors import ConfigError, EnvError
from minrl.scripts.evaluate import check_environment
from minrl.scripts.match_parameters import match_width
from minrl.scripts.train_config import TrainConfig, task_of

HELD_OUT_BATCHES = 8


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
