"""Files that are either whole and unchanged, or refused: weights, trainer state, checkpoints.

A checkpoint of step N is three files, each written to a temporary name, synced and renamed:

    step-N.safetensors   weights and normalisation, with all an agent needs in the header
    step-N.trainer.pt    optimiser and the rest, to go on training exactly
    step-N.json          the same header, readable, scores, and the SHA-256 of the other two

The JSON comes last: a checkpoint without it was never finished. Loading never unpickles: weights
are safetensors, the trainer state goes through ``torch.load(weights_only=True)``, and all bytes are
checked first (neither format checks its own).
"""

import hashlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from minrl.errors import CheckpointError

FORMAT = 1


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Raises:
        CheckpointError: If the disk is full or not writable; the old file is still there.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself must survive a power cut
        finally:
            os.close(folder)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error


def digest_of(content: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def pack_weights(tensors: Mapping[str, Tensor], header: Mapping) -> bytes:
    """Return a .safetensors file's bytes whose header also holds ``header`` and a digest."""
    from safetensors.torch import save

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    not_finite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if not_finite:
        raise CheckpointError(f"refusing to save weights that are not finite: {not_finite[0]}")
    sealed = {"format": FORMAT, **header, "tensors_sha256": _digest_tensors(tensors)}
    return save(tensors, metadata={"minrl": _seal(sealed)})


def load_weights(path: Path | str) -> tuple[dict[str, Tensor], dict]:
    """Read a file of :func:`pack_weights`, checking every byte that matters.

    Returns:
        The tensors by name, on the CPU, and the header.

    Raises:
        CheckpointError: If the file is missing, damaged, of another kind or a newer format.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from error
    if "minrl" not in metadata:
        raise CheckpointError(f"{path} holds no minrl agent, or its header is damaged")
    header = _unseal(metadata["minrl"], path)
    if header["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {header['format']}; this version of minrl reads up to {FORMAT}"
        )
    if header.pop("tensors_sha256") != _digest_tensors(tensors):
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
    ) -> Path:
        """Write the checkpoint of ``step`` and remove the oldest; return its weights' path.

        Args:
            step: Training steps taken.
            tensors: Weights of the model that acts.
            header: What :meth:`DecisionAgent.load` needs, JSON-serialisable.
            trainer_state: Tensors, numbers, strings, lists and dicts only.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot make {self.path}: {error}") from error
        buffer = io.BytesIO()
        torch.save(dict(trainer_state), buffer)
        weights, trainer, record = self._files(step)
        contents = {weights: pack_weights(tensors, header), trainer: buffer.getvalue()}
        for path, content in contents.items():
            write_atomically(path, content)
        digests = {path.name: digest_of(content) for path, content in contents.items()}
        sealed = _seal({"step": step, "score": None, "files": digests, **header}, indent=2)
        write_atomically(record, sealed.encode())
        self._remove_old()
        return weights

    def set_score(self, step: int, score: float) -> None:
        """Note what "best" is judged by for a checkpoint that is there; larger is better."""
        sealed = _seal({**self.header(step), "score": score}, indent=2)
        write_atomically(self._files(step)[2], sealed.encode())

    def steps(self) -> list[int]:
        """Return the steps of all finished checkpoints, ascending."""
        names = (re.fullmatch(r"step-(\d{8,})\.json", path.name) for path in self.path.glob("*"))
        return sorted(int(name[1]) for name in names if name)

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
            content = io.BytesIO(path.read_bytes())
            return torch.load(content, weights_only=True, map_location="cpu")
        except Exception as error:  # of many kinds, depending on where the reader stumbles
            raise CheckpointError(f"{path} cannot be read as trainer state: {error}") from error

    def _files(self, step: int) -> tuple[Path, Path, Path]:
        suffixes = ("safetensors", "trainer.pt", "json")
        return tuple(self.path / f"step-{step:08d}.{suffix}" for suffix in suffixes)

    def _verify(self, step: int) -> None:
        for name, expected in self.header(step)["files"].items():
            try:
                actual = digest_of((self.path / name).read_bytes())
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path / name}: {error}") from error
            if actual != expected:
                raise CheckpointError(f"{self.path / name} is damaged: wrong SHA-256")

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
                score = self.header(step)["score"]
            except CheckpointError:
                continue  # reported by whoever tries to load it
            scores[step] = -float("inf") if score is None else score
        return scores

    def _remove_old(self) -> None:
        for leftover in self.path.glob("step-*.tmp"):  # of a save that was killed
            leftover.unlink(missing_ok=True)
        scores = self._scores()
        best = max(scores, key=lambda step: (scores[step], step), default=None)
        for step in self.steps()[: -self.keep]:
            if step != best:
                for path in reversed(self._files(step)):  # the JSON first: no half checkpoints
                    path.unlink(missing_ok=True)


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
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its JSON cannot be read") from error
    if actual != expected:
        raise CheckpointError(f"{path} is damaged: its JSON does not match its SHA-256")
    return content
