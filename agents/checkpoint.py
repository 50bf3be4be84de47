"""Checkpoints that are either whole and unchanged, or refused.

A checkpoint of step N is three files, each written to a temporary name, synced and renamed:

    step-N.safetensors          weights and normalisation, with all an agent needs in the header
    step-N.trainer.safetensors  optimiser and the rest, to go on training exactly
    step-N.json                 the header of the first, readable, whether the step was evaluated,
                                the score, and the SHA-256 of the other two

The JSON comes last: a checkpoint without it was never finished. Nothing is ever pickled, and all
bytes are checked before they are used, which safetensors itself does not do.

Format 1, which no released version wrote, had a pickle in the place of the second file. It is not
opened: the weights beside it can be evaluated and exported, training cannot go on from it.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minrl.agents.files import (
    LARGEST_TEXT,
    digest_of,
    digest_of_file,
    read_text,
    replace_files,
    write_atomically,
)
from minrl.agents.trainer_state import put_together, take_apart
from minrl.errors import CheckpointError

FORMAT = 2
_TRAINER = {1: "trainer.pt", 2: "trainer.safetensors"}


def pack_weights(tensors: Mapping[str, Tensor], header: Mapping) -> bytes:
    """Return a .safetensors file's bytes whose header also holds ``header`` and a digest.

    Raises:
        CheckpointError: If a tensor is not finite, or the header is too large to be read again.
    """
    tensors = _copy_finite(tensors)
    return _pack(tensors, {**header, "tensors_sha256": _digest_tensors(tensors)})


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Read a file of :func:`pack_weights`, checking every byte that matters.

    Returns:
        The tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind or a newer format.
    """
    tensors, header = _unpack(Path(path))
    if header.pop("tensors_sha256", None) != _digest_tensors(tensors):
        raise CheckpointError(f"{path} is damaged: its weights do not match their SHA-256")
    return tensors, header


def is_finite_number(value: object) -> bool:
    """Tell whether something read from a file is a number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


class CheckpointFolder:
    """The checkpoints of one run: the last few and the best.

    Args:
        path: The folder; made when first written to.
        keep: How many of the newest to keep; the best one is kept as well.
    """

    def __init__(self, path: Path | str, keep: int = 3):
        self.path, self.keep = Path(path), keep

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        header: Mapping,
        trainer_state: Mapping,
    ) -> None:
        """Write the checkpoint of ``step`` and remove the oldest.

        Args:
            step: Training steps taken.
            tensors: Weights of the model that acts.
            header: What :meth:`DecisionAgent.load` needs, JSON-serialisable.
            trainer_state: Of tensors and what :mod:`minrl.agents.trainer_state` says.

        Raises:
            CheckpointError: If a number is not finite, something is of another type, or the disk is
                full or not writable; the checkpoints that are there stay as they are.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error}") from error
        tree, parts = take_apart(trainer_state)
        weights, trainer, record = (
            self._file(step, kind) for kind in ("safetensors", _TRAINER[FORMAT], "json")
        )
        contents = {
            weights: pack_weights(tensors, header),
            trainer: _pack(_copy_finite(parts), {"tree": tree}),
        }
        known = {
            "format": FORMAT,
            "step": step,
            "evaluated": False,
            "score": None,
            "files": {path.name: digest_of(content) for path, content in contents.items()},
        }
        contents[record] = _seal({**known, **header}, indent=2).encode()
        if len(contents[record]) > LARGEST_TEXT:
            raise CheckpointError(f"refusing to save {record}: it would be too large to be read")
        self._remove_leftovers()  # first: they may be what fills the disk
        replace_files(contents)
        self._remove_old(step)

    def note_evaluation(self, step: int, score: float | None = None) -> None:
        """Note that all was measured that is measured after a step.

        Args:
            step: Of a checkpoint that is there.
            score: What "best" is judged by, larger is better; None if there is none.
        """
        noted = {"evaluated": True, "score": score if is_finite_number(score) else None}
        sealed = _seal({**self.header(step), **noted}, indent=2)
        write_atomically(self._file(step, "json"), sealed.encode())

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, ascending."""
        return sorted({step for step, _ in self._found("json")})

    def last(self) -> int:
        """Return the newest step whose files are all unchanged, warning of those that are not.

        Raises:
            CheckpointError: If there is none.
        """
        return self._newest_sound(reversed(self.steps()))

    def best(self) -> int:
        """Return the sound checkpoint with the highest score; the last one if none has a score."""
        scores = self._scores()
        return self._newest_sound(sorted(scores, key=lambda step: (scores[step], step))[::-1])

    def weights(self, step: int) -> Path:
        """Return the path of a checkpoint's weights."""
        return self._file(step, "safetensors")

    def header(self, step: int) -> dict:
        """Return a checkpoint's JSON: what was known when it was saved, score and digests.

        Raises:
            CheckpointError: If it cannot be read or is damaged.
        """
        path = self._file(step, "json")
        return _unseal(read_text(path), path)

    def trainer_state(self, step: int) -> dict:
        """Read a checkpoint's trainer state.

        Raises:
            CheckpointError: If it is of format 1, is damaged, or holds anything but tensors and
                plain values.
        """
        header = self.header(step)
        if header.get("format", 1) == 1:
            raise CheckpointError(
                f"{self._file(step, 'json')} has format 1, from which training cannot go on: train "
                "anew; minrl evaluate and minrl export still take its weights"
            )
        self._verify(step)
        path = self._file(step, _TRAINER[FORMAT])
        try:
            tensors, header = _unpack(path)  # whose digest is that of the whole file
            return put_together(header.get("tree"), tensors)
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as trainer state: {error}") from error

    def _file(self, step: int, suffix: str) -> Path:
        return self.path / f"step-{step:08d}.{suffix}"

    def _found(self, suffixes: str) -> list[tuple[int, Path]]:
        """Return step and path of the files of these suffixes, a pattern."""
        matches = [
            (re.fullmatch(rf"step-([0-9]{{8,}})\.({suffixes})", path.name), path)
            for path in self.path.glob("step-*")
        ]
        found = [(int(match[1]), path) for match, path in matches if match]
        return sorted((step, path) for step, path in found if os.path.isfile(path))

    def _verify(self, step: int) -> None:
        header, record = self.header(step), self._file(step, "json")
        trainer = self._file(step, _TRAINER[header.get("format", 1)])
        paths, digests = (self.weights(step), trainer), header.get("files")
        if not isinstance(digests, dict) or digests.keys() != {path.name for path in paths}:
            raise CheckpointError(f"{record} is not that of these files")
        for path in paths:
            if digest_of_file(path) != digests[path.name]:
                raise CheckpointError(f"{path} is damaged: wrong SHA-256")

    def _newest_sound(self, steps: Iterable[int]) -> int:
        for step in steps:
            try:
                self._verify(step)
            except CheckpointError as error:
                warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=3)
            else:
                return step
        raise CheckpointError(f"no sound checkpoint in {self.path}")

    def _scores(self) -> dict[int, float]:
        scores = {}
        for step in self.steps():
            try:
                score = self.header(step).get("score")
            except CheckpointError:
                continue  # reported by whoever tries to load it
            scores[step] = score if is_finite_number(score) else -math.inf
        return scores

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of a save that was killed."""
        for leftover in self.path.glob("step-*.tmp"):
            with contextlib.suppress(OSError):
                leftover.unlink()

    def _remove_old(self, newest: int) -> None:
        # What is later than the newest could not be gone on from, and would only take the place of
        # a sound one. What has no JSON belongs to a save or a removal that was killed.
        scores = {step: score for step, score in self._scores().items() if step <= newest}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        kept = {best, *[step for step in self.steps() if step <= newest][-self.keep :]}
        found = self._found("json|safetensors|trainer\\.(pt|safetensors)")
        for step, files in itertools.groupby(found, key=lambda item: item[0]):
            # What cannot be removed, such as a file that Windows has open, is tried the next time.
            with contextlib.suppress(OSError):
                for _, path in files if step < newest and step not in kept else ():
                    path.unlink()  # in the order of their names, JSON first: no half checkpoints


def _copy_finite(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU; copies, since safetensors takes no two that share memory."""
    fresh = torch.contiguous_format
    copies = {name: x.detach().cpu().clone(memory_format=fresh) for name, x in tensors.items()}
    for name, tensor in copies.items():
        if not tensor.isfinite().all():
            raise CheckpointError(f"refusing to save weights that are not finite: {name}")
    return copies


def _pack(tensors: dict[str, Tensor], header: Mapping) -> bytes:
    from safetensors.torch import save

    content = save(tensors, metadata={"minrl": _seal({"format": FORMAT, **header})})
    if _header_size(content) > LARGEST_TEXT:
        raise CheckpointError(f"refusing to save {len(tensors)} tensors: there is no room for more")
    return content


def _unpack(path: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import safe_open

    if not os.path.isfile(path):  # nor a named pipe, which would be waited for
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with path.open("rb") as file:
            if _header_size(file.read(8)) > LARGEST_TEXT:
                raise ValueError("its header is larger than any such should be")
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: the file may be gone, or cut short, before the tensors are.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of many kinds, depending on where the reader stumbles
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "minrl" not in metadata:
        raise CheckpointError(f"{path} holds no minrl agent, or its header is damaged")
    return tensors, _unseal(metadata["minrl"], path)


def _header_size(content: bytes) -> int:
    """Return how long the header of a .safetensors file is, which its first 8 bytes say."""
    return int.from_bytes(content[:8], "little")


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _seal(content: Mapping, indent: int | None = None) -> str:
    """Return JSON text that carries its own SHA-256."""
    digest = digest_of(json.dumps(content, sort_keys=True).encode())
    return json.dumps({**content, "sha256": digest}, indent=indent)


def _unseal(text: str, path: Path) -> dict:
    try:
        content = json.loads(text)
        expected = content.pop("sha256")
        actual = digest_of(json.dumps(content, sort_keys=True).encode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its JSON cannot be read") from error
    if actual != expected:
        raise CheckpointError(f"{path} is damaged: its JSON does not match its SHA-256")
    written_in = content.get("format", 1)  # the first checkpoints' JSON does not say
    if written_in not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path} has format {written_in}; this version of minrl reads up to {FORMAT}"
        )
    return content
