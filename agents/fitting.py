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


def check_count(what: str, found: object) -> None:
    """Refuse what is not 0, 1, 2 ...

    Raises:
        CheckpointError: Says what it is.
    """
    if type(found) is not int or not 0 <= found < 2**63:
        raise CheckpointError(f"{what} is {found!r:.50}")


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
    _check_groups(expected["param_groups"], found["param_groups"])
    parameters = dict(enumerate(model.named_parameters()))
    if not isinstance(found["state"], Mapping):
        raise CheckpointError("the optimizer's state is missing")
    for index, state in found["state"].items():
        if index not in parameters:
            raise CheckpointError(f"the optimizer has a weight {index}, which is unknown here")
        name, parameter = parameters[index]
        check_keys(f"the optimizer's {name}", dict.fromkeys(("step", *MOMENTS)), state)
        _check_tensor(f"the optimizer's step of {name}", torch.zeros(()), state["step"])
        for moment in MOMENTS:
            _check_tensor(f"the optimizer's {moment} of {name}", parameter, state[moment])


def _check_groups(expected: list[dict], found: object) -> None:
    """Refuse groups of other weights, or with settings of other types."""
    if not isinstance(found, list) or not all(isinstance(group, Mapping) for group in found):
        raise CheckpointError("the optimizer's param_groups is no list of dicts")
    indices = [[group.get("params") for group in groups] for groups in (expected, found)]
    if indices[0] != indices[1]:
        here, there = (
            sum(len(one) for one in groups if isinstance(one, list)) for groups in indices
        )
        raise CheckpointError(f"the optimizer is of {there} weights, not of {here}")
    for group, other in zip(expected, found, strict=True):
        for name in group.keys() & other.keys():  # other versions of PyTorch have others
            if type(other[name]) is not type(group[name]):
                raise CheckpointError(f"the optimizer's {name} is {other[name]!r:.50}")


def _check_tensor(what: str, expected: Tensor, found: object) -> None:
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{what} is no tensor")
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise CheckpointError(
            f"{what} is {tuple(found.shape)} {found.dtype}, not "
            f"{tuple(expected.shape)} {expected.dtype}"
        )
