"""What an adapter does when its library is not there, or not what it was written for."""

import contextlib
import importlib.metadata
from collections.abc import Iterator

from minrl.errors import AdapterError


@contextlib.contextmanager
def interface_of(library: str, *, install: str, known: str) -> Iterator[None]:
    """Import a library, and look at what is needed of it, in here.

    Args:
        library: Its name on PyPI.
        install: What installs it, for the message.
        known: The versions that are known to work, for the message.

    Raises:
        AdapterError: If it is not installed, or its interface is another one.
    """
    try:
        yield
    except (ImportError, AttributeError, TypeError) as error:
        try:
            version = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            raise AdapterError(f"{library} is not installed: {install}") from error
        raise AdapterError(
            f"minrl cannot plug into {library} {version} ({error}); versions known to work: {known}"
        ) from error
