"""What the header of an agent's file may ask for: nobody vouches for it."""

import math

import torch
from torch import Tensor

from minrl.agents.field_types import is_of
from minrl.agents.fitting import check_weights
from minrl.agents.model_config import DEFAULT_ATTENTION_CONTEXT
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import ConfigError

# What acting in one environment may take, in bytes and in sizes of the model's weights: a file of a
# few kilobytes can ask for windows of any length. A thousand steps of any model fit several times.
ALWAYS_ALLOWED, ALLOWED_PER_WEIGHT = 256 << 20, 10
PER_CHANNEL = 20  # numbers in a state, at most: Mamba's, with its convolution


def build_model(description: dict, tensors: dict[str, Tensor]) -> TrajectoryModel:
    """Return the model of a description with these weights.

    A file may describe any size: nothing is built of one that does not have the weights for it.

    Raises:
        Exception: If something does not fit, of many kinds.
    """
    if description["config"]["num_layers"] > len(tensors):
        raise ValueError(f"it describes more layers than it has weights, {len(tensors)}")
    with torch.device("meta"):
        check_weights("the model", TrajectoryModel.from_description(description), tensors)
    model = TrajectoryModel.from_description(description)
    model.load_state_dict(tensors)
    return model


def check_info(info: dict) -> None:
    """Refuse what nobody who asks an agent for its dataset or environment would expect.

    Raises:
        ValueError: Names what it is.
    """
    dataset = info.get("dataset", {})
    if not isinstance(dataset, dict):
        raise ValueError(f"its dataset is {dataset!r:.50}")
    for there, name, declared in (
        (dataset, "reference_min", float | None),
        (dataset, "reference_max", float | None),
        (dataset, "score_note", str | None),
        (info, "environment", str | None),
        (info, "step", int | None),
    ):
        if not is_of(there.get(name), declared):
            raise ValueError(f"its {name} is {there[name]!r:.50}")
    lowest, highest = dataset.get("reference_min"), dataset.get("reference_max")
    if None not in (lowest, highest) and not 0 < abs(highest - lowest) < math.inf:
        raise ValueError(f"its reference_min is {lowest!r:.50}, its reference_max {highest!r:.50}")


def refuse_much_memory(model: TrajectoryModel, context: int, states: int) -> None:
    """Refuse to act with a window of ``context`` steps out of proportion to the model.

    Args:
        model: The model that is to act.
        context: Steps of the window, 0 for none.
        states: How many are taken along in place of going through the window, 1 for none.

    Raises:
        ConfigError: Says how much it would take.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    needed, allowed = _memory(model, context, states), ALWAYS_ALLOWED + ALLOWED_PER_WEIGHT * weights
    if needed > allowed:
        window = f"a window of {context} steps" if context else "this attention_context"
        raise ConfigError(
            f"acting with {window} takes about {needed >> 20} MiB for each environment, and at "
            f"most {allowed >> 20} are allowed with this model"
        )


def _memory(model: TrajectoryModel, context: int, states: int) -> int:
    """Return about how many bytes acting in one environment takes.

    How often each part is there at the peak was measured: 2 to 5 times.
    """
    config = model.config
    per_step = config.tokens_per_step
    steps = context if states == 1 else 0  # gone through at once
    tokens, seen = (steps or states) * per_step, 0
    carried = PER_CHANNEL * config.expansion
    if config.backbone == "transformer":
        seen = (config.attention_context or DEFAULT_ATTENTION_CONTEXT) * per_step
        carried = 2 * seen
    carried *= config.width * config.num_layers * states
    window = steps * (model.observation_size + model.action_size + 3)
    hidden = tokens * config.width * (config.mlp_ratio + 4 * config.expansion + 4)
    attended = config.num_heads * tokens * (steps * per_step + seen) if seen else 0
    return 4 * (5 * carried + window + 4 * hidden + 3 * attended)
