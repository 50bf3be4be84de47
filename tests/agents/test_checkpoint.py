import json
import os
import stat
import zipfile

import pytest
import torch

from minrl.agents.checkpoint import (
    CheckpointFolder,
    digest_of,
    load_weights,
    pack_weights,
    write_atomically,
)
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


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_user_wants_for_new_ones(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_a_checkpoint_without_a_finite_score_is_never_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2, 3], [-5.0, float("nan"), float("inf")])
    assert folder.best() == 1


def test_a_checkpoint_of_before_its_json_had_a_format_is_read(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1])
    record = tmp_path / "step-00000001.json"
    content = json.loads(record.read_text())
    del content["format"], content["sha256"]
    digest = digest_of(json.dumps(content, sort_keys=True).encode())
    record.write_text(json.dumps({**content, "sha256": digest}))
    assert folder.last() == 1
    assert folder.header(1) == content
