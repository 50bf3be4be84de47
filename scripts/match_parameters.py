"""Models of about the same number of parameters, whatever their backbone."""

import bisect
import dataclasses
import math

import torch

from minrl.agents.model_config import ModelConfig
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import ConfigError

LARGEST_WIDTH = 4096


def count_parameters(config: ModelConfig, observation_size: int, action_size: int) -> int:
    """Return the number of parameters of a model, without allocating any."""
    with torch.device("meta"):
        model = TrajectoryModel(observation_size, action_size, config)
    return sum(parameter.numel() for parameter in model.parameters())


def match_width(
    config: ModelConfig, observation_size: int, action_size: int, parameters: int
) -> int:
    """Return the width with which a model comes nearest to a number of parameters.

    Widths are multiples of 4, and of the heads of a transformer.

    Raises:
        ConfigError: If no width comes near.
    """
    unit = math.lcm(4, config.num_heads)

    def count(width: int) -> int:
        wide = dataclasses.replace(config, width=width)
        return count_parameters(wide, observation_size, action_size)

    widths = range(unit, LARGEST_WIDTH + 1, unit)
    above = bisect.bisect_left(widths, parameters, key=count)
    nearest = widths[max(above - 1, 0) : above + 1]
    if above in (0, len(widths)) and count(nearest[0]) != parameters:
        least, most = count(widths[0]), count(widths[-1])
        raise ConfigError(
            f"match-parameters must be from {least} to {most} for {config.backbone} here, not "
            f"{parameters}"
        )
    return min(nearest, key=lambda width: abs(count(width) - parameters))
