"""A disk that is full costs what did not fit, and nothing that was there."""

import dataclasses
import errno
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from children import ask, limit_file_size, minrl, mount_small_disk, started

from minrl import cli
from minrl.agents.checkpoint import CheckpointFolder, load_weights
from minrl.agents.files import replace_files
from minrl.errors import CheckpointError, MinrlError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train

SIZES = 20


def save_step(folder, step):
    tensors = {"w": torch.full((5_000,), float(step))}
    folder.save(step, tensors, {}, {"m": torch.full((9_000,), float(step))})


def is_intact(folder, step):
    tensors, _ = load_weights(folder.weights(step))
    state = folder.trainer_state(step)
    return bool((tensors["w"] == step).all() and (state["m"] == step).all())


def save_into(path, step, limit):
    limit_file_size(limit)
    try:
        save_step(CheckpointFolder(path), step)
    except CheckpointError as error:
        return str(error)
    return None


def begin_with(arguments, limit):
    limit_file_size(limit)
    return cli.main(arguments)


def files_in(path):
    return {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.integration
def test_a_checkpoint_that_does_not_fit_leaves_the_ones_before_and_no_file(tmp_path):
    folder, generator = CheckpointFolder(tmp_path), np.random.default_rng(0)
    save_step(folder, 1)
    before, largest = files_in(tmp_path), max(map(len, files_in(tmp_path).values()))
    for limit in np.linspace(0, largest - 1, SIZES, dtype=int):
        step = 1 + int(generator.integers(2))  # in the place of the old one, or beside it
        message = ask(save_into, tmp_path, step, int(limit))
        assert message.startswith("cannot write ")
        assert "File too large" in message
        assert files_in(tmp_path) == before
    assert folder.last() == 1
    assert is_intact(folder, 1)
    assert ask(save_into, tmp_path, 2, largest) is None
    assert folder.last() == 2


def save_until_full(path, size):
    """Save on a disk that has room for a few checkpoints and is filled more and more by others."""
    path.mkdir(exist_ok=True)
    try:
        mount_small_disk(path, size)
    except OSError as error:
        return f"cannot mount: {error}"
    folder, failures, step = CheckpointFolder(path, keep=2), [], 1
    save_step(folder, step)
    for number in range(1000):
        try:
            (path / f"other-{number}").write_bytes(b"x" * 7_000)
        except OSError:
            (path / f"other-{number}").unlink(missing_ok=True)
            break
        try:
            save_step(folder, step + 1)
            step += 1
        except CheckpointError as error:
            failures.append(str(error))
        sound = folder.last() == step and is_intact(folder, step)
        if not sound or list(path.glob("*.tmp")):
            return f"lost at {number}: {os.listdir(path)}"
    return step, failures


def test_a_file_system_that_fills_up_loses_no_checkpoint(tmp_path):
    answer = ask(save_until_full, tmp_path / "disk", 500_000)
    if "cannot mount" in answer:
        pytest.skip(answer)
    step, failures = answer
    assert step >= 2
    assert len(failures) >= 5
    assert all("No space left on device" in failure for failure in failures)


def train_with(path, limit):
    """Go on with a run to step 24; return whether the error it ends with is ours, and its text."""
    limit_file_size(limit)
    run = RunFolder(path)
    try:
        train(dataclasses.replace(run.read_config(), steps=24), resume=path)
    except Exception as error:
        return isinstance(error, MinrlError), f"{type(error).__name__}: {error}"
    return None


@pytest.fixture(scope="module")
def begun(train_arguments, tmp_path_factory):
    """A run of 8 steps."""
    path = tmp_path_factory.mktemp("runs") / "begun"
    with started(minrl, *train_arguments(path, "--steps", "8")) as process:
        process.join()
        assert process.exitcode == 0
    return path


def write_metrics(path, limit):
    limit_file_size(limit)
    try:
        with RunFolder(path).metrics() as metrics:
            for step in range(100):
                metrics.write(step, {"train/loss": 0.5})
    except MinrlError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("limit", "file"), [(0, "events.out"), (150, "metrics.jsonl"), (3000, "events.out")]
)
def test_metrics_that_do_not_fit_are_named_and_the_lines_before_kept(tmp_path, limit, file):
    run = RunFolder(tmp_path)
    rows = [{"step": step, "train/loss": 0.5} for step in range(100)]
    before = "".join(json.dumps(row) + "\n" for row in rows[: 2 if limit == 150 else 0])
    run.metrics_file.write_text(before)
    message = ask(write_metrics, tmp_path, limit)
    assert message.startswith("cannot write ")
    assert file in message
    assert run.metrics_file.read_text().startswith(before)
    assert all(row in rows for row in run.read_metrics())


@pytest.mark.integration
@pytest.mark.parametrize("sizes", [2, pytest.param(SIZES, marks=pytest.mark.slow)])
def test_training_on_a_full_disk_says_so_and_loses_nothing(
    tmp_path, sizes, begun, contents_of, assert_equal
):
    whole = tmp_path / "whole"
    shutil.copytree(begun, whole)
    assert ask(train_with, whole, resource.RLIM_INFINITY) is None
    largest, before = max(map(len, files_in(whole).values())), contents_of(begun)
    # Each file of a run is the first to grow too large at one of them.
    for number, limit in enumerate(np.geomspace(500, largest - 1, sizes, dtype=int)):
        path = tmp_path / str(number)
        shutil.copytree(begun, path)
        is_ours, message = ask(train_with, path, int(limit))
        assert is_ours, message
        assert "cannot write" in message
        assert "File too large" in message
        assert not list(path.rglob("*.tmp"))
        run = RunFolder(path)
        if run.checkpoints.last() == 8:
            assert_equal(contents_of(path)["state"], before["state"])
            assert_equal(contents_of(path)["weights"], before["weights"])
        if number == 1 or sizes == SIZES:
            assert ask(train_with, path, resource.RLIM_INFINITY) is None
            assert_equal(contents_of(path), contents_of(whole))


def test_a_run_that_cannot_be_begun_leaves_room_for_another_try(tmp_path, train_arguments):
    path, log = tmp_path / "run", tmp_path / "log"
    assert ask(begin_with, train_arguments(path), 0) == 2
    with started(minrl, *train_arguments(path, "--steps", "1"), output=log) as process:
        process.join()
        assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_failing_system_call_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, failing, call
):
    old = {tmp_path / name: b"old" for name in ("first", "second", "third")}
    replace_files(old)
    calls, plain = [], getattr(os, failing)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise OSError(errno.EIO, "Input/output error")
        return plain(*arguments)

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*Input/output error"):
        replace_files(dict.fromkeys(old, b"new"))
    new = 0 if failing == "fsync" else call - 1
    assert [path.read_bytes() for path in old] == [b"new"] * new + [b"old"] * (3 - new)
    assert len(list(tmp_path.iterdir())) == 3
