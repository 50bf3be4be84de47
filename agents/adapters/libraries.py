"""What an adapter does when its library is not there, or not what it was written for."""

import contextlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator

from minrl.errors import AdapterError


@contextlib.contextmanager
def interface_of(library: str, *, install: str, known: str) -> Iterator[None]:
    """Import a library, and look at what is needed of it, in here.

    Args:
        library: Its name on PyPI.
        install: What installs it, for the message.
        known: The versions that are known to work, for the message.

    Raises:
        AdapterError: If it is not installed, or not all that it needs, or its interface is another
            one.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            raise AdapterError(f"{library} is not installed: {install}") from error
        if isinstance(error, ModuleNotFoundError) and error.name and not _is_installed(error.name):
            raise AdapterError(
                f"{library} {version} is not installed whole ({error}): {install}"
            ) from error
        raise AdapterError(
            f"minrl cannot plug into {library} {version} ({error}); versions known to work: {known}"
        ) from error


def _is_installed(module: str) -> bool:
    """Return whether there is the package that a module is in."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def check_call(function: Callable, *arguments: object, **keywords: object) -> None:
    """Refuse a function of a library's that could not be called like this (it is not called).

    Args:
        function: Of a class: then the first argument stands for ``self``.
        *arguments: Any values.
        **keywords: Any values.

    Raises:
        TypeError: If it could not; names the function and the argument.
    """
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"{function.__qualname__}: {error}") from None
