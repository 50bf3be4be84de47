"""A run that is continued on another machine says that it is no longer the same run bit for bit."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from children import minrl, started

from minrl import DecisionAgent
from minrl.agents import checkpoint
from minrl.agents.checkpoint import load_weights
from minrl.agents.training import Trainer
from minrl.errors import CheckpointError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:the learning rate goes on as if"),
]


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


@pytest.mark.parametrize("missing", ["trainer", "losses", "skipped"])
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


WRONG = {
    "losses": (torch.zeros(3, dtype=torch.float64), "there are other losses than those of 2 steps"),
    "skipped": (10**9, "there are other losses than those of 2 steps"),
    "trainer": ([1], "the state of training is missing"),
}


@pytest.mark.parametrize("part", WRONG)
def test_a_state_of_other_types_is_refused(run, part):
    value, message = WRONG[part]
    rewrite_state(run, **{part: value})
    with pytest.raises(CheckpointError, match=message):
        go_on(run)


WRONG_PARTS = {
    "a step of text": (lambda t: t.update(step="2"), "training's step is '2'"),
    "a negative step": (lambda t: t.update(step=-1), "training's step is -1"),
    "skips": (lambda t: t.update(skips_in_a_row=None), "skips_in_a_row is None"),
    "optimizer": (lambda t: t.update(optimizer=[]), "the optimizer is missing"),
    "groups": (lambda t: t["optimizer"].update(param_groups=3), "param_groups is no list"),
    "a group": (lambda t: t["optimizer"].update(param_groups=[3]), "param_groups is no list"),
    "no group": (lambda t: t["optimizer"].update(param_groups=[]), "is of 0 weights"),
    "weights": (lambda t: group(t).update(params=7), "is of 0 weights"),
    "betas": (lambda t: group(t).update(betas="0.9"), "the optimizer's betas is '0.9'"),
    "lr": (lambda t: group(t).update(lr="fast"), "the optimizer's lr is 'fast'"),
    "state": (lambda t: t["optimizer"].update(state=[1]), "the optimizer's state is missing"),
    "counter": (lambda t: t["optimizer"]["state"][0].update(step="1"), "step of .* is no tensor"),
    "moment": (
        lambda t: t["optimizer"]["state"][0].update(exp_avg=None),
        "exp_avg of .* no ten",
    ),
}


def group(trainer):
    return trainer["optimizer"]["param_groups"][0]


@pytest.mark.parametrize("kind", WRONG_PARTS)
def test_a_trainer_of_other_types_is_refused_and_nothing_is_changed(begun, kind):
    change, message = WRONG_PARTS[kind]
    run = RunFolder(begun)
    config, model = run.read_config(), DecisionAgent.load(begun).model
    trainer = Trainer(model, config.optimization, total_steps=3)
    state = run.checkpoints.trainer_state(2)["trainer"]
    change(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        trainer.load_state_dict(state)
    assert trainer.step_count == 0
    assert not trainer.update.optimizer.state_dict()["state"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dataset", [None, 5, [], {}, {"sha256": 3}], ids=str)
def test_a_checkpoint_that_does_not_name_its_data_is_refused(run, dataset):
    folder = run.checkpoints
    tensors, header = load_weights(folder.weights(2))
    folder.save(2, tensors, {**header, "dataset": dataset}, folder.trainer_state(2))
    with pytest.raises(CheckpointError, match=r"checkpoint 2 of .* does not say what data it is"):
        go_on(run)


def test_a_run_of_format_1_is_not_gone_on_with(run):
    folder, assets = run.checkpoints, Path(__file__).parents[1] / "assets" / "checkpoints"
    content = json.loads((folder.path / "step-00000002.json").read_text())
    old = json.loads((assets / "format-1" / "step-00000001.json").read_text())
    shutil.rmtree(folder.path)
    shutil.copytree(assets / "format-1", folder.path)
    del old["sha256"]
    sealed = checkpoint._seal({**old, "dataset": content["dataset"]})
    (folder.path / "step-00000001.json").write_text(sealed)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="has format 1, from which training cannot go on"):
        go_on(run)
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
