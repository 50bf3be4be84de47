"""Writing episodes as an ordinary Minari dataset: whole or not at all, and one writer at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from minrl.data.dataset_ids import check_id, dataset_folder, datasets_root, minari_writing_to
from minrl.data.episodes import Episode
from minrl.data.metadata import check_reference_scores
from minrl.errors import DatasetError

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.spaces import Box


@dataclass(frozen=True)
class DatasetCard:
    """What a dataset says about itself.

    Attributes:
        dataset_id: Its Minari id.
        environment_id: Gymnasium id of the environment it belongs to.
        observation_space: One-dimensional Box.
        action_space: One-dimensional Box.
        algorithm_name: What chose the actions.
        description: What the data is, in words.
        reference_scores: Returns that score 0 and 100 percent, None when not known.
        requirements: For pip, those of the environment.

    Raises:
        DatasetError: If the reference scores are no scale.
    """

    dataset_id: str
    environment_id: str
    observation_space: Box
    action_space: Box
    algorithm_name: str
    description: str
    reference_scores: tuple[float, float] | None = None
    requirements: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.reference_scores is not None:
            try:
                check_reference_scores(*self.reference_scores)
            except ValueError as error:
                raise DatasetError(f"dataset {self.dataset_id}: {error}") from error


@contextlib.contextmanager
def dataset_lock(dataset_id: str) -> Iterator[None]:
    """Hold the only right to write this dataset, waiting for another process that holds it.

    The operating system frees the lock when its holder dies.
    """
    import filelock

    locks = datasets_root() / ".minrl-locks"
    try:
        locks.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DatasetError(
            f"cannot write datasets below {datasets_root()} (MINARI_DATASETS_PATH): {error}"
        ) from error
    with filelock.FileLock(locks / f"{check_id(dataset_id).replace('/', '--')}.lock"):
        yield


def write_dataset(card: DatasetCard, episodes: Sequence[Episode]) -> None:
    """Write a Minari dataset (HDF5) from episodes with T+1 observations each.

    It is written in a hidden folder and moved into place in one step, so that an interrupted write
    leaves nothing that could be loaded. Call it under ``dataset_lock``.

    Raises:
        DatasetError: If the id is taken, or the folder cannot be written.
    """
    folder = dataset_folder(card.dataset_id)
    if folder.exists():
        raise DatasetError(f"dataset {card.dataset_id} exists already in {folder}; remove it first")
    workshop = datasets_root() / f".minrl-making--{card.dataset_id.replace('/', '--')}"
    try:
        shutil.rmtree(workshop, ignore_errors=True)  # left by a write that was killed
        workshop.mkdir(parents=True)
        try:
            with minari_writing_to(workshop):
                _create(card, episodes)
            _make_namespace(card.dataset_id)
            os.replace(workshop / card.dataset_id, folder)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    except OSError as error:
        raise DatasetError(
            f"dataset {card.dataset_id} cannot be written to {folder}: {error}"
        ) from error


def _create(card: DatasetCard, episodes: Sequence[Episode]) -> None:
    """Let Minari write the files."""
    import minari
    from minari.data_collector import EpisodeBuffer

    specification = _specification(card.environment_id)
    buffers = [
        EpisodeBuffer(id=index, **_no_images(episode.arrays()))
        for index, episode in enumerate(episodes)
    ]
    with warnings.catch_warnings():
        # Minari wishes for an e-mail address and a link, and for the environment, which is added
        # below as its specification: given as such, Minari would make it (several times).
        for wish in ("`code_permalink`", "`author_email`", "`eval_env`", "env_spec is None"):
            warnings.filterwarnings("ignore", message=wish, category=UserWarning)
        dataset = minari.create_dataset_from_buffers(
            card.dataset_id,
            buffers,
            observation_space=card.observation_space,
            action_space=card.action_space,
            algorithm_name=card.algorithm_name,
            author="minrl",
            description=card.description,
            requirements=list(card.requirements),
        )
    metadata = {"env_spec": specification, "eval_env_spec": specification}
    if card.reference_scores is not None:
        metadata["ref_min_score"], metadata["ref_max_score"] = card.reference_scores
    dataset.storage.update_metadata(metadata)


def _no_images(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return an episode's arrays, bytes as float32: Minari 0.5.3 would write them as JPEG."""
    return {
        name: values.astype(np.float32) if values.dtype == np.uint8 else values
        for name, values in arrays.items()
    }


def time_limit(environment_id: str) -> int | None:
    """Return the steps after which an environment ends an episode, None for no limit.

    Raises:
        DatasetError: If it is not registered.
    """
    return _registered(environment_id).max_episode_steps


def _registered(environment_id: str) -> EnvSpec:
    import gymnasium

    try:
        return gymnasium.spec(environment_id)
    except gymnasium.error.Error as error:
        raise DatasetError(f"environment {environment_id} is not known: {error}") from error


def _specification(environment_id: str) -> str:
    """Return what an environment is registered as, in Gymnasium's JSON.

    Raises:
        DatasetError: If it is not registered, or with what JSON cannot hold.
    """
    spec = _registered(environment_id)
    maker = spec.entry_point
    if callable(maker):  # which Gymnasium does not write; the name of it says the same
        name = getattr(maker, "__qualname__", type(maker).__name__)  # a partial has none
        maker = f"{maker.__module__}:{name}"
    try:
        return dataclasses.replace(spec, entry_point=maker, vector_entry_point=None).to_json()
    except (TypeError, ValueError) as error:
        raise DatasetError(
            f"environment {environment_id} is registered with arguments that a dataset's metadata "
            f"cannot hold ({error}); register it with numbers and text"
        ) from error


def _make_namespace(dataset_id: str) -> None:
    """Register the folders above the dataset as Minari namespaces."""
    from minari.namespace import create_namespace, list_local_namespaces

    namespace = dataset_id.rpartition("/")[0]
    if namespace and namespace not in list_local_namespaces():
        with contextlib.suppress(ValueError):  # another process was faster
            create_namespace(namespace)
