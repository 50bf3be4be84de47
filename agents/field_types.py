"""Whether what a configuration holds is of the types it declares: it may be read from a file."""

import dataclasses
import numbers
import types
import typing
from pathlib import Path

_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    types.NoneType: "nothing",
}


def is_of(value: object, declared: type) -> bool:
    """Tell whether a value is of a declared type, such as ``int | None`` or ``tuple[str, ...]``."""
    if declared is typing.Any:
        return True
    choices = typing.get_args(declared)
    if (container := typing.get_origin(declared)) in (tuple, list):  # tuple[X, ...]
        return isinstance(value, container) and all(is_of(item, choices[0]) for item in value)
    if container is dict:
        return isinstance(value, dict) and all(
            is_of(key, choices[0]) and is_of(item, choices[1]) for key, item in value.items()
        )
    if choices:
        return any(is_of(value, choice) for choice in choices)
    if declared in (int, float) and isinstance(value, numbers.Integral):
        return not isinstance(value, bool) and -(2**63) <= value < 2**63
    return isinstance(value, numbers.Real if declared is float else declared)


def wrong_types(config: object) -> list[str]:
    """Return which fields of a dataclass, and of those in it, hold another type than they declare.

    Whole numbers are those of 64 bits, and stand for numbers, too.
    """
    found = []
    for name, declared in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not is_of(value, declared):
            found.append(f"{name} must be {_name(declared)}, not {value!r:.50}")
        elif dataclasses.is_dataclass(declared):
            found += wrong_types(value)
    return found


def _name(declared: type) -> str:
    choices = typing.get_args(declared)
    if typing.get_origin(declared) is tuple:
        return f"a tuple, each {_name(choices[0])}"
    if choices:
        return " or ".join(map(_name, choices))
    return _NAMES.get(declared, f"a {declared.__name__}")
