"""The errors a user can act on; the command line prints them without a traceback.

Each also derives from the built-in class a caller would expect to catch.
"""

from collections.abc import Mapping

# Exit status of a command that was no error but stopped by Ctrl-C or SIGTERM, as shells have it.
INTERRUPTED = 130


class MinrlError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(MinrlError, ValueError):
    """A setting is unknown, out of range or does not fit the data; the message names the field."""


class DatasetError(MinrlError, ValueError):
    """A dataset is missing, malformed or refused; the message names the id, rule and place."""


class EnvError(MinrlError, ValueError):
    """An environment is unknown or has spaces that are not supported."""


class EvaluationError(EnvError):
    """An evaluation that came to no end.

    Args:
        message: What happened, naming environment, episode and step.
        finished: Return and length by episode, of those that were over before. There is no mean of
            them here, on purpose: short episodes are over first, so it would be biased.
    """

    def __init__(self, message: str, finished: Mapping[int, tuple[float, int]] | None = None):
        super().__init__(message)
        self.finished = dict(sorted((finished or {}).items()))


class CheckpointError(MinrlError, RuntimeError):
    """A checkpoint or another file of a run cannot be written, or is missing or damaged."""


class TrainingError(MinrlError, RuntimeError):
    """Training cannot go on, for example after ten non-finite losses in a row."""


class ExportError(MinrlError, RuntimeError):
    """An agent cannot be exported: a library is missing, or the file acts differently."""


class AdapterError(MinrlError, ImportError):
    """A library that an adapter plugs into is missing, or has another interface."""
