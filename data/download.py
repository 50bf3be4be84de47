"""Downloading Minari datasets, with one clear message within seconds when that is not possible."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

from minrl.data.dataset_ids import EMBEDDED_IDS, REMOTE_IDS, dataset_folder, near_matches
from minrl.errors import DatasetError

_REQUEST_SECONDS = 5.0
_PROBE_SECONDS = 8.0  # name resolution obeys no timeout of the request
_DEFAULT_REMOTE = "hf://farama-minari"


def download_dataset(dataset_id: str) -> None:
    """Download a dataset into the datasets' folder.

    The server is asked once before Minari is, which by itself tries six times over 23 seconds and
    ends in a traceback.

    Raises:
        DatasetError: If the server cannot be reached, or has no such dataset.
    """
    _probe(dataset_id)
    import minari

    incomplete = dataset_folder(dataset_id).exists()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Minari prints its progress
            minari.download_dataset(dataset_id, force_download=incomplete)
    except Exception as error:  # storage back ends raise errors of many libraries
        raise _failure(dataset_id, error) from error


def unknown_dataset(dataset_id: str, why: str, local_ids: list[str]) -> DatasetError:
    """Return an error that names the dataset, why it is not there, and ids like it."""
    near = near_matches(dataset_id, [*local_ids, *EMBEDDED_IDS, *REMOTE_IDS])
    embedded = near_matches(dataset_id, EMBEDDED_IDS) or ["minrl/hopper/medium-expert-v0"]
    hint = f" Did you mean {', '.join(near)}?" if near and near[0] != dataset_id else ""
    return DatasetError(
        f"dataset {dataset_id} is not on this machine and {why}.{hint} Without a network, use an "
        f"embedded dataset such as {embedded[0]}."
    )


def _probe(dataset_id: str) -> None:
    """Ask a Hugging Face remote once whether it has the dataset's repository."""
    kind, _, owner = os.environ.get("MINARI_REMOTE", _DEFAULT_REMOTE).partition("://")
    if kind != "hf":
        return
    try:  # before the clock runs: the time that an import takes is not the server's
        from huggingface_hub import HfApi
    except ImportError as error:
        raise _failure(dataset_id, error) from error
    failures: list[Exception] = []

    def ask() -> None:
        try:
            repository = f"{owner}/{dataset_id.partition('/')[0]}"
            HfApi().dataset_info(repository, timeout=_REQUEST_SECONDS)
        except Exception as error:  # reported by the caller's thread
            failures.append(error)

    # A daemon thread, because a name server that does not answer cannot be interrupted.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if thread.is_alive():
        failures.append(TimeoutError(f"no answer within {_PROBE_SECONDS:g} seconds"))
    if failures:
        raise _failure(dataset_id, failures[0]) from failures[0]


def _failure(dataset_id: str, error: Exception) -> DatasetError:
    """Say what went wrong with a download."""
    from minrl.data.minari_source import local_ids

    if type(error).__name__ == "RepositoryNotFoundError":
        why = "Minari's server has none of this name"
    else:
        cause = str(error).strip().partition("\n")[0]
        why = f"the download failed ({type(error).__name__}: {cause})"
    return unknown_dataset(dataset_id, why, local_ids())
