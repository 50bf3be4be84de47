"""A run that is continued on another machine says that it is no longer the same run bit for bit."""

import dataclasses
import shutil

import pytest
import torch
from children import minrl, started

from minrl.agents.checkpoint import load_weights
from minrl.errors import CheckpointError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train


@pytest.fixture(scope="module")
def begun(train_arguments, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    with started(minrl, *train_arguments(path, "--steps", "2", "--eval-episodes", "0")) as process:
        process.join()
        assert process.exitcode == 0
    return path


@pytest.fixture
def run(begun, tmp_path):
    """A copy of a run of two steps."""
    shutil.copytree(begun, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def go_on(run, steps=3):
    train(dataclasses.replace(run.read_config(), steps=steps), resume=run.path)


def rewrite_state(run, **changes):
    folder = run.checkpoints
    tensors, header = load_weights(folder.weights(2))
    header.pop("format")
    folder.save(2, tensors, header, {**folder.trainer_state(2), **changes})


def test_other_circumstances_are_named(run):
    others = {
        "torch": "2.9.0",
        "numpy": "1.26.0",
        "device": "NVIDIA H100",
        "processes": 4,
        "instructions": "arm64 DEFAULT",
    }
    rewrite_state(run, **others)
    torch.set_num_threads(2)
    try:
        with pytest.warns(UserWarning, match="not bit for bit") as warned:
            go_on(run)
    finally:
        torch.set_num_threads(1)
    said = [str(warning.message) for warning in warned]
    for name, value in {**others, "threads": 1}.items():
        assert sum(f"trained with {name} {value}, now it is" in text for text in said) == 1
    assert run.checkpoints.last() == 3


@pytest.mark.parametrize("missing", ["trainer", "losses"])
def test_a_state_without_a_part_is_refused_by_name(run, missing):
    folder = run.checkpoints
    state = folder.trainer_state(2)
    del state[missing]
    tensors, header = load_weights(folder.weights(2))
    folder.save(2, tensors, {**header}, state)
    with pytest.raises(CheckpointError, match=rf"checkpoint 2 of .* does not fit: '{missing}'"):
        go_on(run)


def test_a_key_that_does_not_fit_is_named_and_the_run_left_as_it_is(run):
    trainer = run.checkpoints.trainer_state(2)["trainer"]
    trainer["model"]["head.weight"] = torch.zeros(5, 5)
    rewrite_state(run, trainer=trainer)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"does not fit: the model's head.weight is \(5, 5\)"):
        go_on(run)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_without_any_checkpoint_says_that_it_starts_again(run, capsys):
    shutil.rmtree(run.checkpoints.path)
    go_on(run)
    assert "there is no checkpoint" in capsys.readouterr().out
    assert run.checkpoints.last() == 3
    steps = [row["step"] for row in run.read_metrics()]
    assert steps == sorted(set(steps)) or steps[-1] == 3
