"""Modules of the user's own that register environments, imported before a command runs."""

import importlib
import os
import sys

from minrl.errors import ConfigError

VARIABLE = "MINRL_IMPORT"
"""Environment variable with their names, through which a study's processes know them."""


def add_import(name: str) -> None:
    """Import a module here and in the processes that a command starts.

    Only ever by a name that the user gave: none is taken from a dataset, a checkpoint or a run.

    Raises:
        ConfigError: If it cannot be imported.
    """
    os.environ[VARIABLE] = ",".join([*_names(), name])
    import_named()


def import_named() -> None:
    """Import what the environment variable names; modules may lie in the working folder.

    Raises:
        ConfigError: If one of them cannot be imported.
    """
    if _names() and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there takes the place of a library
    for name in _names():
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever its own code raises
            raise ConfigError(
                f"--import {name}: it cannot be imported ({type(error).__name__}: {error})"
            ) from error


def _names() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]
