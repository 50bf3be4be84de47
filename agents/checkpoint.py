"""Files that are either whole and unchanged, or refused: weights, trainer state, checkpoints.

A checkpoint of step N is three files, each written to a temporary name, synced and renamed:

    step-N.safetensors   weights and normalisation, with all an agent needs in the header
    step-N.trainer.pt    optimiser and the rest, to go on training exactly
    step-N.json          the same header, readable, scores, and the SHA-256 of the other two

The JSON comes last: a checkpoint without it was never finished. Loading never unpickles: weights
are safetensors, the trainer state goes through ``torch.load(weights_only=True)``, and all bytes are
checked first (neither format checks its own).
"""

import contextlib
import hashlib
import io
import json
import math
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from minrl.agents.trainer_archive import read_trainer_state
from minrl.errors import CheckpointError

FORMAT = 1
_LARGEST_JSON = 16 << 20  # bytes


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Raises:
        CheckpointError: If the disk is full or not writable; the old file is still there.
    """
    replace_files({path: content})


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Write files so that a crash at any moment leaves each of them as it was, or new.

    They take their names in the order given, and only when all are on the disk: if there is no room
    for the last, the first has not changed.

    Raises:
        CheckpointError: If the disk is full or not writable; nothing is left behind.
    """
    staged: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            staged[path] = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
            with staged[path].open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in staged.items():
            os.replace(temporary, path)
            _sync_folder(path.parent)
    except BaseException as error:  # after Ctrl-C, too, nothing is left behind
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise CheckpointError(f"cannot write {path}: {error}") from error
        raise


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def pack_weights(tensors: Mapping[str, Tensor], header: Mapping) -> bytes:
    """Return a .safetensors file's bytes whose header also holds ``header`` and a digest."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    _refuse_not_finite(tensors)
    sealed = {"format": FORMAT, **header, "tensors_sha256": _digest_tensors(tensors)}
    return save(tensors, metadata={"minrl": _seal(sealed)})


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Read a file of :func:`pack_weights`, checking every byte that matters.

    Returns:
        The tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind or a newer format.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        digest = _digest_tensors(tensors)
    except Exception as error:  # of many kinds, depending on where the reader stumbles
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "minrl" not in metadata:
        raise CheckpointError(f"{path} holds no minrl agent, or its header is damaged")
    header = _unseal(metadata["minrl"], path)
    if header.pop("tensors_sha256", None) != digest:
        raise CheckpointError(f"{path} is damaged: its weights do not match their SHA-256")
    return tensors, header


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
            trainer_state: Tensors, numbers, strings, lists and dicts only.

        Raises:
            CheckpointError: If a tensor is not finite, or the disk is full or not writable; the
                checkpoints that are there stay as they are.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error}") from error
        _refuse_not_finite(trainer_state)
        buffer = io.BytesIO()
        torch.save(dict(trainer_state), buffer)
        weights, trainer, record = self._files(step)
        contents = {weights: pack_weights(tensors, header), trainer: buffer.getvalue()}
        digests = {path.name: digest_of(content) for path, content in contents.items()}
        known = {"format": FORMAT, "step": step, "score": None, "files": digests}
        contents[record] = _seal({**known, **header}, indent=2).encode()
        self._remove_leftovers()  # first: they may be what fills the disk
        replace_files(contents)
        self._remove_old(step)

    def set_score(self, step: int, score: float) -> None:
        """Note what "best" is judged by for a checkpoint that is there; larger is better."""
        sealed = _seal({**self.header(step), "score": score}, indent=2)
        write_atomically(self._files(step)[2], sealed.encode())

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, ascending."""
        return self._steps_with("json")

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
        return self._files(step)[0]

    def header(self, step: int) -> dict:
        """Return a checkpoint's JSON: what was known when it was saved, score and digests.

        Raises:
            CheckpointError: If it cannot be read or is damaged.
        """
        path = self._files(step)[2]
        try:
            if path.stat().st_size > _LARGEST_JSON:
                raise CheckpointError(f"{path} is larger than any such file should be")
            return _unseal(path.read_text(), path)
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def trainer_state(self, step: int) -> dict:
        """Read a checkpoint's trainer state.

        Raises:
            CheckpointError: If it is damaged or holds anything but tensors and plain values.
        """
        self._verify(step)
        path = self._files(step)[1]
        try:
            return read_trainer_state(path.read_bytes())
        except Exception as error:  # of many kinds, depending on where the reader stumbles
            raise CheckpointError(f"{path} cannot be read as trainer state: {error}") from error

    def _files(self, step: int) -> tuple[Path, Path, Path]:
        suffixes = ("safetensors", "trainer.pt", "json")
        return tuple(self.path / f"step-{step:08d}.{suffix}" for suffix in suffixes)

    def _steps_with(self, suffix: str) -> list[int]:
        pattern = rf"step-(\d{{8,}})\.{suffix}"
        names = (re.fullmatch(pattern, path.name) for path in self.path.glob("step-*"))
        return sorted({int(name[1]) for name in names if name})

    def _verify(self, step: int) -> None:
        *paths, record = self._files(step)
        digests = self.header(step).get("files")
        if not isinstance(digests, dict) or digests.keys() != {path.name for path in paths}:
            raise CheckpointError(f"{record} is not that of these files")
        for path in paths:
            try:
                actual = digest_of(path.read_bytes())
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error}") from error
            if actual != digests[path.name]:
                raise CheckpointError(f"{path} is damaged: wrong SHA-256")

    def _newest_sound(self, steps) -> int:
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
            is_score = isinstance(score, (int, float)) and math.isfinite(score)
            scores[step] = score if is_score else -math.inf
        return scores

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of a save that was killed."""
        for leftover in self.path.glob("step-*.tmp"):
            leftover.unlink(missing_ok=True)

    def _remove_old(self, newest: int) -> None:
        # What is later than the newest could not be gone on from, and would only take the place of
        # a sound one. What has no JSON belongs to a save or a removal that was killed.
        scores = {step: score for step, score in self._scores().items() if step <= newest}
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        kept = {best, *[step for step in self.steps() if step <= newest][-self.keep :]}
        for step in self._steps_with("(safetensors|trainer\\.pt|json)"):
            if step < newest and step not in kept:
                for path in reversed(self._files(step)):  # the JSON first: no half checkpoints
                    path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    """Make a rename in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _refuse_not_finite(values: Mapping) -> None:
    for name, tensor in _tensors_in(values):
        if not tensor.isfinite().all():
            raise CheckpointError(f"refusing to save weights that are not finite: {name}")


def _tensors_in(values: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and lists, each with its keys joined by dots."""
    if isinstance(values, Tensor):
        yield name, values
    elif isinstance(values, Mapping):
        for key, value in values.items():
            yield from _tensors_in(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, (list, tuple)):
        yield from _tensors_in(dict(enumerate(values)), name)


def _digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
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
    written_in = content.get("format", FORMAT)  # the first checkpoints' JSON does not say
    if written_in not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path} has format {written_in}; this version of minrl reads up to {FORMAT}"
        )
    return content
