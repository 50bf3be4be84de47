import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from minrl.agents import checkpoint
from minrl.agents.checkpoint import CheckpointFolder, load_weights, pack_weights
from minrl.agents.files import write_atomically
from minrl.errors import CheckpointError

TENSORS = {"weight": torch.arange(12.0).view(3, 4), "steps": torch.tensor([1, 2])}
HEADER = {"model": {"width": 4}, "dataset": {"sha256": "ab"}}


def save_steps(folder, steps, scores=None):
    for index, step in enumerate(steps):
        tensors = {"weight": torch.full((2, 2), float(step))}
        state = {"step": step, "moments": [torch.ones(3)]}
        folder.save(step, tensors, HEADER, state)
        if scores is not None:
            folder.note_evaluation(step, scores[index])


def test_weights_and_header_come_back_unchanged(tmp_path):
    write_atomically(tmp_path / "a.safetensors", pack_weights(TENSORS, HEADER))
    tensors, header = load_weights(tmp_path / "a.safetensors")
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())
    assert header == {"format": 2, **HEADER}


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
    with pytest.raises(CheckpointError, match="has format 99; this version of minrl reads up to 2"):
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


def test_trainer_state_comes_back(tmp_path):
    folder = CheckpointFolder(tmp_path / "made" / "with its parent")
    save_steps(folder, [5])
    state = folder.trainer_state(5)
    assert state["step"] == 5
    assert torch.equal(state["moments"][0], torch.ones(3))
    record = json.loads((folder.path / "step-00000005.json").read_text())
    assert record["files"].keys() == {
        "step-00000005.safetensors",
        "step-00000005.trainer.safetensors",
    }


@pytest.mark.parametrize("suffix", ["safetensors", "trainer.safetensors", "json"])
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


def test_a_damaged_best_checkpoint_falls_back_to_the_next_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=4)
    save_steps(folder, [1, 2, 3, 4], [2.0, 4.0, 3.0, 1.0])
    (tmp_path / "step-00000002.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"step-00000002.*trying the checkpoint before it"):
        assert folder.best() == 3


def test_a_score_that_cannot_be_read_is_passed_over(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    save_steps(folder, [1, 2], [9.0, 1.0])
    (tmp_path / "step-00000001.json").write_text("{}")
    assert folder.best() == 2
    save_steps(folder, [3], [0.0])
    assert folder.steps() == [2, 3]


def test_what_is_later_than_the_newest_takes_no_place(tmp_path):
    """Training went back to step 3, since step 9 was damaged, say."""
    folder = CheckpointFolder(tmp_path, keep=2)
    save_steps(folder, [1, 2, 3, 9], [5.0, 1.0, 1.0, 99.0])
    save_steps(folder, [4, 5], [1.0, 1.0])
    assert folder.steps() == [1, 4, 5, 9]
    save_steps(folder, [9, 10], [0.0, 0.0])
    assert folder.steps() == [1, 9, 10]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    leftovers = [tmp_path / f"step-00000001.{name}.tmp" for name in ("json.0a1b", "json.2c3d")]
    for path in [*leftovers, tmp_path / "notes.tmp"]:
        path.write_text("half")
    save_steps(CheckpointFolder(tmp_path), [2])
    assert [path.name for path in tmp_path.glob("*.tmp")] == ["notes.tmp"]


def test_a_json_without_digests_is_not_that_of_its_files(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1])
    for files in (["step-00000001.safetensors"], None, {}):
        sealed = checkpoint._seal({**folder.header(1), "files": files})
        (tmp_path / "step-00000001.json").write_text(sealed)
        with (
            pytest.warns(UserWarning, match="json is not that of these files"),
            pytest.raises(CheckpointError, match="no sound checkpoint"),
        ):
            folder.last()


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


def test_a_checkpoint_without_a_finite_score_is_never_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2, 3], [-5.0, float("nan"), float("inf")])
    assert folder.best() == 1


def test_what_is_no_file_is_not_opened(tmp_path):
    """Opening a named pipe would wait for ever."""
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2])
    (tmp_path / "step-00000002.safetensors").unlink()
    os.mkfifo(tmp_path / "step-00000002.safetensors")
    os.mkfifo(tmp_path / "step-00000003.json")
    (tmp_path / "step-00000004.json").mkdir()
    (tmp_path / "step-00000005.json").symlink_to("/dev/zero")
    (tmp_path / "step-00000006.json.0a1b2c3d.tmp").mkdir()
    assert folder.steps() == [1, 2]
    with pytest.warns(UserWarning, match="there is no such file; trying"):
        assert folder.last() == 1
    with pytest.raises(CheckpointError, match=r"cannot read .*json: there is no such file"):
        folder.header(3)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_weights(tmp_path / "step-00000002.safetensors")
    save_steps(folder, [7])
    assert folder.last() == 7


@pytest.mark.parametrize("score", [10**400, "9", [9], None, True, float("nan")])
def test_a_score_that_is_no_number_is_none(tmp_path, score):
    folder = CheckpointFolder(tmp_path)
    for step, its in ((1, -5.0), (2, score)):
        folder.save(step, {}, {"score": its}, {})
    assert folder.best() == (2 if score is True else 1)


def test_whether_a_step_was_evaluated_is_in_its_json(tmp_path):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2, 3])
    folder.note_evaluation(1)
    folder.note_evaluation(2, 5.0)
    found = [(folder.header(step)["evaluated"], folder.header(step)["score"]) for step in (1, 2, 3)]
    assert found == [(True, None), (True, 5.0), (False, None)]


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    monkeypatch.setattr(checkpoint, "LARGEST_TEXT", 3000)
    with pytest.raises(CheckpointError, match="there is no room for more"):
        folder.save(1, {f"weight.{number}": torch.ones(1) for number in range(50)}, {}, {})
    with pytest.raises(CheckpointError, match="there is no room for more"):
        folder.save(1, {}, {}, {"numbers": list(range(2000))})
    with pytest.raises(CheckpointError, match="too large to be read"):
        folder.save(1, {}, {"many": [1] * 500}, {})
    assert not list(tmp_path.iterdir())


def test_a_header_beyond_all_measure_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_atomically(tmp_path / "a.safetensors", pack_weights(TENSORS, HEADER))
    monkeypatch.setattr(checkpoint, "LARGEST_TEXT", 50)
    with pytest.raises(CheckpointError, match="header is larger than any such should be"):
        load_weights(tmp_path / "a.safetensors")


def test_weights_in_any_order_of_memory_come_back(tmp_path):
    transposed = torch.arange(12.0).view(3, 4).t()
    write_atomically(tmp_path / "a.safetensors", pack_weights({"weight": transposed}, HEADER))
    assert torch.equal(load_weights(tmp_path / "a.safetensors")[0]["weight"], transposed)


def test_a_file_that_cannot_be_removed_fails_no_save(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path)
    save_steps(folder, [1, 2, 3])

    def refuse(path, **_):
        raise PermissionError(f"{path} is open")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        save_steps(folder, [4])
    assert folder.steps() == [1, 2, 3, 4]
    save_steps(folder, [5])
    assert folder.steps() == [3, 4, 5]
