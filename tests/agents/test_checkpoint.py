import errno
import json
import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from minrl.agents.checkpoint import CheckpointFolder, load_weights, pack_weights, write_atomically
from minrl.errors import CheckpointError

TENSORS = {"weight": torch.arange(12.0).view(3, 4), "steps": torch.tensor([1, 2])}
HEADER = {"model": {"width": 4}, "dataset": {"sha256": "ab"}}


def save_steps(folder, steps, scores=None):
    for index, step in enumerate(steps):
        tensors = {"weight": torch.full((2, 2), float(step))}
        state = {"step": step, "moments": [torch.ones(3)]}
        folder.save(step, tensors, HEADER, state)
        if scores is not None:
            folder.set_score(step, scores[index])


def test_weights_and_header_come_back_unchanged(tmp_path):
    write_atomically(tmp_path / "a.safetensors", pack_weights(TENSORS, HEADER))
    tensors, header = load_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert header == {"format": 1, **HEADER}


def test_no_flipped_bit_is_loaded(tmp_path):
    path = tmp_path / "a.safetensors"
    sound = pack_weights(TENSORS, HEADER)
    generator = np.random.default_rng(0)
    for position in generator.integers(8 * len(sound), size=300):
        damaged = bytearray(sound)
        damaged[position // 8] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            tensors, header = load_weights(path)
        except CheckpointError:
            continue
        # A flip in a space of padding, say: nothing that matters.
        assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
        assert header == {"format": 1, **HEADER}


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, -1])
def test_no_truncated_file_is_loaded(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    path.write_bytes(pack_weights(TENSORS, HEADER)[:keep])
    with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
        load_weights(path)


def test_other_files_are_refused_with_the_reason(tmp_path):
    from safetensors.torch import save_file

    save_file(TENSORS, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="holds no minrl agent"):
        load_weights(tmp_path / "plain.safetensors")
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_weights(tmp_path / "zip.safetensors")
    write_atomically(tmp_path / "new.safetensors", pack_weights(TENSORS, {**HEADER, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99; this version of minrl reads up to 1"):
        load_weights(tmp_path / "new.safetensors")


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match="not finite: bad"):
        folder.save(1, {"bad": torch.tensor([1.0, float("nan")])}, HEADER, {})
    assert folder.steps() == []


def test_the_newest_three_and_the_best_are_kept(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2, 3, 4, 5, 6], [0.0, 9.0, 1.0, 2.0, 3.0, 4.0])
    assert folder.steps() == [2, 4, 5, 6]
    assert (folder.last(), folder.best()) == (6, 2)
    assert len(list(tmp_path.iterdir())) == 3 * 4


def test_trainer_state_comes_back_and_is_never_unpickled(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [5])
    state = folder.trainer_state(5)
    assert state["step"] == 5
    assert torch.equal(state["moments"][0], torch.ones(3))
    record = json.loads((tmp_path / "step-00000005.json").read_text())
    assert record["files"].keys() == {"step-00000005.safetensors", "step-00000005.trainer.pt"}


def test_a_trainer_state_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    folder = CheckpointFolder(tmp_path)
    folder.save(1, TENSORS, HEADER, {"state": Payload()})
    with pytest.raises(CheckpointError, match="cannot be read as trainer state"):
        folder.trainer_state(1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "trainer.pt", "json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, suffix, damage):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2])
    path = tmp_path / f"step-00000002.{suffix}"
    content = bytearray(path.read_bytes())
    if damage == "delete":
        path.unlink()
    elif damage == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
    if suffix == "json" and damage == "delete":  # then it was never finished
        assert folder.last() == 1
        return
    with pytest.warns(UserWarning, match=r"step-00000002.*trying the checkpoint before it"):
        assert folder.last() == 1


def test_other_files_in_the_folder_are_no_checkpoints(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1])
    (tmp_path / "step-00000002 (copy).json").write_text("{}")
    (tmp_path / "notes.json").write_text("{}")
    assert folder.steps() == [1]


def test_a_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot make"):
        save_steps(CheckpointFolder(tmp_path / "file" / "checkpoints"), [1])


def test_no_sound_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no sound checkpoint in"):
        CheckpointFolder(tmp_path).last()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*file.*No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


SAVE_WITH_LIMIT = """
import resource, signal, sys, torch
from minrl.agents.checkpoint import CheckpointFolder
from minrl.errors import CheckpointError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    CheckpointFolder(sys.argv[1]).save(2, {"w": torch.ones(5000)}, {}, {"m": torch.ones(9000)})
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 10_000, 30_000])
def test_a_full_disk_is_reported_and_the_old_checkpoint_stays(tmp_path, limit):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1])
    command = [sys.executable, "-c", SAVE_WITH_LIMIT, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("cannot write ")
    assert not list(tmp_path.glob("*.tmp"))
    assert folder.last() == 1
    assert folder.trainer_state(1)["step"] == 1
    assert resource.RLIMIT_FSIZE  # the limit was the child's, not ours


KILL_LOOP = """
import sys, torch
from minrl.agents.checkpoint import CheckpointFolder
folder = CheckpointFolder(sys.argv[1])
print("ready", flush=True)
for step in range(1, 10**6):
    folder.save(step, {"w": torch.full((50_000,), float(step))}, {}, {"step": step})
"""


def test_kill_at_any_moment_of_saving_leaves_a_sound_checkpoint(tmp_path):
    generator = np.random.default_rng(0)
    command = [sys.executable, "-c", KILL_LOOP, str(tmp_path)]
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1 + 0.2 * generator.random())
            process.kill()
        folder = CheckpointFolder(tmp_path)
        step = folder.last()  # a warning here would fail the test
        tensors, _ = load_weights(folder.weights(step))
        assert (tensors["w"] == step).all()
        assert folder.trainer_state(step)["step"] == step
