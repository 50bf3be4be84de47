"""A Minari dataset's metadata.json: read as text, checked, and never executed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minrl.data.dataset_ids import refuse_links_out
from minrl.data.episodes import DatasetInfo
from minrl.data.validate import LARGEST_ACTION, ActionBounds
from minrl.errors import DatasetError

_SUPPORTED = "minrl supports one-dimensional Box observations with Box actions"
_FORMATS = ("hdf5", "arrow", "parquet")
_LARGEST = 4 << 20  # bytes; a hundred thousand numbers take less


@dataclass(frozen=True)
class Metadata:
    """What is taken from a dataset's metadata.json; nothing in it is ever executed."""

    dataset_id: str
    data_format: str
    num_episodes: int
    num_steps: int
    observation_size: int
    bounds: ActionBounds
    environment_id: str | None
    max_episode_steps: int | None
    reference_min: float | None
    reference_max: float | None
    d4rl_version: str | None


def _read_count(raw: Mapping[str, Any], name: str) -> int:
    count = raw[name]
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name} must be a positive whole number, got {count!r}")
    return count


def _read_format(raw: Mapping[str, Any]) -> str:
    if raw["data_format"] not in _FORMATS:
        raise ValueError(f"data_format must be one of {_FORMATS}, got {raw['data_format']!r}")
    return raw["data_format"]


def _read_space(
    dataset_id: str, raw: Mapping[str, Any], role: str
) -> tuple[tuple[int, ...], ActionBounds]:
    """Return shape and bounds of a space, which must be a one-dimensional Box.

    A bound beyond 1e30 counts as none: writers put float32's largest number there, and the distance
    between two of those is infinite.
    """
    name = f"{role}_space"
    if name not in raw:
        raise DatasetError(
            f"dataset {dataset_id}: its metadata has no {name}, and minrl builds no environment to "
            "find out; add it to metadata.json"
        )
    space = json.loads(raw[name])
    kind, shape = space["type"], tuple(space.get("shape", ()))
    if kind != "Box" or len(shape) != 1:
        found = f"a Box of shape {shape}, as of images" if kind == "Box" else f"of type {kind}"
        raise DatasetError(f"dataset {dataset_id}: the {role} space is {found}; {_SUPPORTED}")
    low, high = (np.array(space[end], np.float64) for end in ("low", "high"))
    if shape[0] < 1 or low.shape != shape or high.shape != shape:
        raise ValueError(f"{name} has shape {shape} but bounds of {low.shape} and {high.shape}")
    if not (low <= high).all():  # nor is it if one is NaN
        raise ValueError(f"{name} has a lower bound that is not below its upper bound")
    low = np.where(low < -LARGEST_ACTION, -np.inf, low)
    high = np.where(high > LARGEST_ACTION, np.inf, high)
    return shape, ActionBounds(low, high)


def _read_scores(raw: Mapping[str, Any]) -> tuple[float, float] | tuple[None, None]:
    """Return the returns for 0 and 100 percent, which must differ; None where one is missing."""
    scores = raw.get("ref_min_score"), raw.get("ref_max_score")
    if None in scores:
        return None, None
    low, high = map(float, scores)
    check_reference_scores(low, high)
    return low, high


def _read_d4rl_version(raw: Mapping[str, Any]) -> str | None:
    """Return the version of the D4RL file that it was imported from, such as v2, if it was."""
    found = re.match(r"D4RL-(v\d+) ", str(raw.get("description", "")))
    return found[1] if found else None


def check_reference_scores(low: float, high: float) -> None:
    """Do nothing, if returns can be put in percent between these.

    Raises:
        ValueError: If they cannot.
    """
    if not low < high or not math.isfinite(high - low):
        raise ValueError(
            f"reference scores must be finite, the lower first, not {low:g} and {high:g}"
        )


def read_metadata(dataset_id: str, folder: Path) -> Metadata:
    """Read metadata.json without Minari, whose reader builds environments named in it.

    Raises:
        DatasetError: If it is a link out of the dataset's folder, or not usable; the message names
            the field.
    """
    path = folder / "data" / "metadata.json"
    refuse_links_out(dataset_id, path, folder)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise DatasetError(
                f"dataset {dataset_id}: {path} is larger than any metadata should be"
            )
        raw = json.loads(content)
        observation_shape, _ = _read_space(dataset_id, raw, "observation")
        _, bounds = _read_space(dataset_id, raw, "action")
        environment = json.loads(raw.get("env_spec") or "{}")
        limit = environment.get("max_episode_steps")
        reference_min, reference_max = _read_scores(raw)
        return Metadata(
            dataset_id=dataset_id,
            data_format=_read_format(raw),
            num_episodes=_read_count(raw, "total_episodes"),
            num_steps=_read_count(raw, "total_steps"),
            observation_size=observation_shape[0],
            bounds=bounds,
            environment_id=str(environment["id"]) if "id" in environment else None,
            max_episode_steps=int(limit) if limit is not None else None,
            reference_min=reference_min,
            reference_max=reference_max,
            d4rl_version=_read_d4rl_version(raw),
        )
    except DatasetError:
        raise
    except (
        OSError,
        ArithmeticError,  # a number too large for a float
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise DatasetError(
            f"dataset {dataset_id}: {path} is not usable ({type(error).__name__}: {error}); "
            "remove the dataset and make or download it again"
        ) from error


def describe_dataset(metadata: Metadata, actions: np.ndarray, sha256: str) -> DatasetInfo:
    """Say what the dataset is; action bounds that are infinite become those of the data."""
    low, high = metadata.bounds.low, metadata.bounds.high
    low = np.where(np.isfinite(low), low, actions.min(axis=0))
    high = np.where(np.isfinite(high), high, actions.max(axis=0))
    where = f" on {metadata.environment_id}" if metadata.environment_id else ""
    if metadata.dataset_id.startswith("minrl/"):
        note = f"embedded minrl data{where}, D4RL reference scores"
    elif metadata.d4rl_version:
        note = f"D4RL-{metadata.d4rl_version} data{where}, D4RL reference scores"
    elif metadata.reference_min is not None:
        note = f"Minari data{where}, the dataset's own reference scores"
    else:
        note = f"Minari data{where}, D4RL reference scores"
    return DatasetInfo(
        dataset_id=metadata.dataset_id,
        environment_id=metadata.environment_id,
        observation_size=metadata.observation_size,
        action_low=tuple(low.tolist()),
        action_high=tuple(high.tolist()),
        reference_min=metadata.reference_min,
        reference_max=metadata.reference_max,
        score_note=note,
        sha256=sha256,
        max_episode_steps=metadata.max_episode_steps,
    )
