"""Whether a saved state fits a model and its optimizer: asked before any of it is taken over.

PyTorch's own ``load_state_dict`` copies what fits before it complains of the rest, and looks at the
shapes of an optimizer's moments not at all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from minrl.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


def check_keys(what: str, expected: Mapping, found: object) -> None:
    """Refuse what is no dict or has other keys.

    Raises:
        CheckpointError: Names the first key that is missing or unknown.
    """
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{what} is missing")
    for key in expected:
        if key not in found:
            raise CheckpointError(f"{what} has no {key}")
    for key in found:
        if key not in expected:
            raise CheckpointError(f"{what} has {key}, which is unknown here")


def check_weights(what: str, module: nn.Module, found: object) -> None:
    """Refuse tensors that a module cannot take over exactly.

    Raises:
        CheckpointError: Names the first key that is missing, unknown, or of another shape or type.
    """
    expected = module.state_dict()
    check_keys(what, expected, found)
    for key, tensor in expected.items():
        _check_tensor(f"{what}'s {key}", tensor, found[key])


def check_moments(model: nn.Module, optimizer: torch.optim.Optimizer, found: object) -> None:
    """Refuse the state of another optimizer, or one of other weights.

    Raises:
        CheckpointError: Names the first weight whose moments do not fit.
    """
    expected = optimizer.state_dict()
    check_keys("the optimizer", expected, found)
    groups = [[group["params"] for group in state["param_groups"]] for state in (expected, found)]
    if groups[0] != groups[1]:
        here, there = (sum(map(len, group)) for group in groups)
        raise CheckpointError(f"the optimizer is of {there} weights, not of {here}")
    parameters = dict(enumerate(model.named_parameters()))
    for index, state in found["state"].items():
        if index not in parameters:
            raise CheckpointError(f"the optimizer has a weight {index}, which is unknown here")
        name, parameter = parameters[index]
        check_keys(f"the optimizer's {name}", dict.fromkeys(("step", *MOMENTS)), state)
        for moment in MOMENTS:
            _check_tensor(f"the optimizer's {moment} of {name}", parameter, state[moment])


def _check_tensor(what: str, expected: Tensor, found: object) -> None:
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{what} is no tensor")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise CheckpointError(
            f"{what} is {tuple(found.shape)} {found.dtype}, not "
            f"{tuple(expected.shape)} {expected.dtype}"
        )
