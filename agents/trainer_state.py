"""The state of training as tensors by name and a tree in JSON that says where they belong.

So a file of it needs neither pickle nor anything else that builds objects. In the tree numbers,
text, true, false, null and lists stand for themselves, and an object has one key:

    {"dict": [[key, value], ...]}   keys are text or whole numbers
    {"tuple": [value, ...]}
    {"tensor": name}                each tensor is in one place
"""

import math
from collections.abc import Mapping

from torch import Tensor

from minrl.errors import CheckpointError

_DEEPEST = 50


def take_apart(state: Mapping) -> tuple[object, dict[str, Tensor]]:
    """Return the tree of a state, and its tensors by names of their own.

    Tensors that share memory do so no more when they are put together.

    Raises:
        CheckpointError: Names what is not a tensor, finite number, string, bool, None, list, tuple
            or dict, or is nested too deep.
    """
    tensors: dict[str, Tensor] = {}
    return _take_apart(state, (), tensors), tensors


def put_together(tree: object, tensors: Mapping[str, Tensor]) -> dict:
    """Return the state that was taken apart.

    Raises:
        ValueError: If it was not: this is a tree that nobody vouches for.
    """
    left = dict(tensors)
    state = _put_together(tree, left, 0)
    if left:
        raise ValueError(f"the tensor {next(iter(left))} has no place in it")
    if not isinstance(state, dict):
        raise ValueError("it is no dict")
    return state


def _take_apart(value: object, keys: tuple, tensors: dict[str, Tensor]) -> object:
    name = ".".join(map(str, keys))
    if len(keys) > _DEEPEST:
        raise CheckpointError(f"the state of training is nested more than {_DEEPEST} deep: {name}")
    if isinstance(value, Tensor):
        unique = f"{len(tensors)}.{name}"
        tensors[unique] = value
        return {"tensor": unique}
    if isinstance(value, Mapping) and all(type(key) in (str, int) for key in value):
        items = value.items()
        return {"dict": [[key, _take_apart(x, (*keys, key), tensors)] for key, x in items]}
    if type(value) in (list, tuple):
        items = [_take_apart(x, (*keys, index), tensors) for index, x in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if not _is_plain(value):
        raise CheckpointError(f"cannot save {name}, a {type(value).__name__}: {value!r:.100}")
    return value


def _put_together(node: object, tensors: dict[str, Tensor], depth: int) -> object:
    if depth > _DEEPEST:
        raise ValueError(f"it is nested more than {_DEEPEST} deep")
    if isinstance(node, list):
        for index, inner in enumerate(node):  # in place: it may be large
            node[index] = _put_together(inner, tensors, depth + 1)
        return node
    if isinstance(node, dict):
        return _put_object_together(node, tensors, depth)
    if not _is_plain(node):
        raise ValueError(f"{node} is not finite")
    return node


def _put_object_together(node: dict, tensors: dict[str, Tensor], depth: int) -> object:
    kind, content = next(iter(node.items())) if len(node) == 1 else ("", None)
    if kind == "tensor" and isinstance(content, str):
        if content not in tensors:
            raise ValueError(f"the tensor {content:.100} is not there, or was used before")
        return tensors.pop(content)
    if kind not in ("tuple", "dict") or not isinstance(content, list):
        raise ValueError(f"it has an object of unknown kind, with {', '.join(node):.100}")
    if kind == "tuple":
        return tuple(_put_together(content, tensors, depth))
    for pair in content:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (str, int):
            raise ValueError("it has a dict with something other than keys and values")
        pair[1] = _put_together(pair[1], tensors, depth + 1)
    return dict(content)


def _is_plain(value: object) -> bool:
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)
