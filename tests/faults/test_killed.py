"""kill -9, Ctrl-C and SIGTERM at any moment lose nothing that was saved."""

import contextlib
import itertools
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from children import FORKS, minrl, started

from minrl.agents.checkpoint import CheckpointFolder, load_weights

pytestmark = pytest.mark.integration
KILLS_WHILE_SAVING = [20, pytest.param(100, marks=pytest.mark.slow)]
KILLS_WHILE_TRAINING = [2, pytest.param(20, marks=pytest.mark.slow)]
PATIENCE = 120  # seconds; the machine may be busy


def save_for_ever(path, first, saved):
    folder = CheckpointFolder(path)
    for step in range(first, 10**9):
        folder.save(step, {"w": torch.full((50_000,), float(step))}, {}, {"step": step})
        saved.send(step)
        folder.note_evaluation(step, float(step))


def wait_for_a_checkpoint(path, log):
    deadline = time.monotonic() + PATIENCE
    while not CheckpointFolder(path / "checkpoints").steps():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


def stop_by(process, number):
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode is not None


@pytest.mark.parametrize("kills", KILLS_WHILE_SAVING)
def test_no_kill_while_saving_loses_a_checkpoint(tmp_path, kills):
    generator = np.random.default_rng(0)
    folder, last, interrupted = CheckpointFolder(tmp_path), 0, 0
    for _ in range(kills):
        reader, writer = FORKS.Pipe(duplex=False)
        with reader, started(save_for_ever, tmp_path, last + 1, writer) as process:
            writer.close()
            assert reader.poll(PATIENCE)
            time.sleep(0.03 * generator.random())
            stop_by(process, signal.SIGKILL)
            told = 0
            with contextlib.suppress(EOFError):
                while True:
                    told = reader.recv()
        names = {path.name for path in tmp_path.iterdir()}
        interrupted += len(names) % 3 != 0 or any(name.endswith(".tmp") for name in names)
        last = folder.last()  # a warning of a damaged one would fail the test
        assert last in (told, told + 1)
        tensors, _ = load_weights(folder.weights(last))
        assert (tensors["w"] == last).all()
        assert folder.trainer_state(last)["step"] == last
    assert interrupted > kills // 4  # or the kills came at no interesting moment
    folder.save(last + 1, {"w": torch.ones(1)}, {}, {})
    assert len(list(tmp_path.iterdir())) == 3 * len(folder.steps()) <= 12


@pytest.fixture(scope="module")
def uninterrupted(train_arguments, tmp_path_factory):
    """The folder of a run that nothing happened to, and how long it took."""
    path = tmp_path_factory.mktemp("runs") / "uninterrupted"
    with started(os.getpid) as process:  # the server of children takes its time to start
        process.join(PATIENCE)
    start, log = time.monotonic(), path.with_suffix(".log")
    with started(minrl, *train_arguments(path), output=log) as process:
        process.join(PATIENCE)
        assert process.exitcode == 0, log.read_text()
    return path, time.monotonic() - start


@pytest.mark.parametrize("kills", KILLS_WHILE_TRAINING)
def test_a_killed_training_goes_on_bit_for_bit(
    tmp_path, kills, uninterrupted, train_arguments, contents_of, assert_equal
):
    expected, duration = contents_of(uninterrupted[0]), uninterrupted[1]
    generator, in_time = np.random.default_rng(1), 0
    for number in range(kills):
        path = tmp_path / str(number)
        # One draw from each part of the run, so that a few kills are not all in one place.
        moment = (number + generator.random()) / kills * duration
        log = tmp_path / f"{number}.log"
        start = time.monotonic()
        with started(minrl, *train_arguments(path), output=log) as process:
            process.join(moment)
            if process.exitcode is not None:  # the machine has become quicker
                duration = time.monotonic() - start
            stop_by(process, signal.SIGKILL)
            in_time += process.exitcode == -signal.SIGKILL
        with started(minrl, *train_arguments(path), output=log) as process:
            process.join(PATIENCE)
            assert process.exitcode == 0, log.read_text()
        assert_equal(contents_of(path), expected)
        assert not list(path.rglob("*.tmp"))
    assert in_time >= kills / 2  # or most of them came when all was done


def test_what_is_left_of_killed_saves_is_removed_by_the_next(tmp_path):
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        folder.save(step, {"w": torch.ones(1)}, {}, {})
    (tmp_path / "step-00000002.json").unlink()  # killed between two renames, or two removals
    (tmp_path / "step-00000003.json.0a1b2c3d.tmp").write_text("{")
    folder.save(3, {"w": torch.ones(1)}, {}, {})
    assert folder.steps() == [1, 3]
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number, train_arguments):
    path, log = tmp_path / "run", tmp_path / "log"
    with started(minrl, *train_arguments(path, "--steps", "1000000"), output=log) as process:
        wait_for_a_checkpoint(path, log)
        stop_by(process, number)
        assert process.exitcode == 130, log.read_text()
    step = CheckpointFolder(path / "checkpoints").last()
    assert f"stopped at step {step} and saved; to go on:" in log.read_text()
    assert f"  minrl train --resume {path}" in log.read_text()


def ask_to_stop_twice(arguments, at):
    """Send SIGTERM at a step, and again while its checkpoint is written."""
    from minrl.agents import checkpoint
    from minrl.agents.training import Trainer

    plain_step, plain_replace = Trainer.step_from, checkpoint.replace_files

    def step(trainer, sampler):
        report = plain_step(trainer, sampler)
        if trainer.step_count == at:
            signal.raise_signal(signal.SIGTERM)
        return report

    def replace(contents):
        if any(f"step-{at:08d}" in path.name for path in contents):
            signal.raise_signal(signal.SIGTERM)
        plain_replace(contents)

    Trainer.step_from, checkpoint.replace_files = step, replace
    minrl(*arguments)


def test_a_second_sigterm_does_not_take_back_what_the_first_asked_for(tmp_path, train_arguments):
    path, log = tmp_path / "run", tmp_path / "log"
    with started(ask_to_stop_twice, train_arguments(path), 7, output=log) as process:
        process.join(PATIENCE)
        assert process.exitcode == 130, log.read_text()
    assert CheckpointFolder(path / "checkpoints").last() == 7
    assert "stopped at step 7 and saved; to go on:" in log.read_text()


def interrupt_in_the_middle_of_a_step(arguments, at):
    """Press Ctrl-C twice when the weights are moved and the step is not yet counted."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    steps = itertools.count(1)

    def interrupt(*_):
        if next(steps) == at:
            for _ in range(
                2
            ):  # os.kill may hand it to another thread, and Python be late to see it
                signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second Ctrl-C did not interrupt")

    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
    register_optimizer_step_post_hook(interrupt)
    minrl(*arguments)


@pytest.mark.interrupts
def test_a_step_that_ctrl_c_tears_apart_is_not_saved(
    tmp_path, uninterrupted, train_arguments, contents_of, assert_equal
):
    path, log = tmp_path / "run", tmp_path / "log"
    arguments = train_arguments(path)
    with started(interrupt_in_the_middle_of_a_step, arguments, 7, output=log) as process:
        process.join(PATIENCE)
        assert process.exitcode == 130, log.read_text()
    assert CheckpointFolder(path / "checkpoints").last() == 4
    with started(minrl, *train_arguments(path), output=log) as process:
        process.join(PATIENCE)
        assert process.exitcode == 0, log.read_text()
    assert_equal(contents_of(path), contents_of(uninterrupted[0]))


def test_two_processes_cannot_train_in_one_folder(tmp_path, train_arguments):
    path, logs = tmp_path / "run", [tmp_path / "first", tmp_path / "second"]
    with started(minrl, *train_arguments(path, "--steps", "1000000"), output=logs[0]) as first:
        wait_for_a_checkpoint(path, logs[0])
        with started(minrl, *train_arguments(path), output=logs[1]) as second:
            second.join(PATIENCE)
            assert second.exitcode == 2, logs[1].read_text()
        assert f"another process is training in {path}" in logs[1].read_text()
        assert first.is_alive()
        stop_by(first, signal.SIGKILL)  # the system frees the folder
    step = CheckpointFolder(path / "checkpoints").last()
    arguments = train_arguments(path, "--steps", str(step + 1))
    with started(minrl, *arguments, output=logs[1]) as second:
        second.join(PATIENCE)
        assert second.exitcode == 0, logs[1].read_text()


def test_a_folder_left_by_a_kill_before_the_configuration_is_used(tmp_path, train_arguments):
    path, log = tmp_path / "run", tmp_path / "log"
    path.mkdir()
    (path / ".lock").touch()
    (path / "config.json.0a1b2c3d.tmp").write_text("{")
    with started(minrl, *train_arguments(path, "--steps", "1"), output=log) as process:
        process.join(PATIENCE)
        assert process.exitcode == 0, log.read_text()
    assert not list(path.glob("*.tmp"))


def test_a_copy_without_its_newest_files_goes_on_from_what_it_has(
    tmp_path, uninterrupted, train_arguments, contents_of, assert_equal
):
    path, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(uninterrupted[0], path)
    checkpoints = path / "checkpoints"
    (checkpoints / "step-00000024.trainer.safetensors").unlink()
    weights = checkpoints / "step-00000020.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (path / "metrics.jsonl").write_bytes((path / "metrics.jsonl").read_bytes()[:-5])
    with started(minrl, *train_arguments(path), output=log) as process:
        process.join(PATIENCE)
        assert process.exitcode == 0, log.read_text()
    assert "step-00000024.trainer.safetensors" in log.read_text()
    assert "step-00000020.safetensors is damaged" in log.read_text()
    assert_equal(contents_of(path), contents_of(uninterrupted[0]))
