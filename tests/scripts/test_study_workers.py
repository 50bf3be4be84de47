import contextlib
import dataclasses
import signal

import pytest
import torch
from small_runs import (
    assert_a_study_stops_and_saves,
    make_config,
    start_study,
    step_of,
    wait_until,
    weights_of,
)

from minrl.agents.checkpoint import CheckpointFolder
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.study_run import carry_out, is_done, log_of
from minrl.scripts.study_workers import LocalWorkers
from minrl.scripts.train import train

pytestmark = pytest.mark.integration

PATIENCE = 120  # seconds; the machine may be busy
LONG = {"steps": 600, "eval_every": 100, "eval_episodes": 0, "final_episodes": 0, "log_every": 10}


def test_a_killed_worker_loses_no_run(hopper_id, tmp_path):
    run = make_config(hopper_id, tmp_path / "study" / "run", **LONG)
    workers = LocalWorkers([run], workers=1, threads=1)
    assert workers.poll() == []
    wait_until(lambda: step_of(run.run_dir) > 120)
    workers.processes[0][1].send_signal(signal.SIGKILL)
    wait_until(lambda: workers.processes[0][1].poll() is not None)
    ((ended, problem),) = workers.poll()
    assert ended == run
    assert problem.startswith("killed by SIGKILL; last line: ")
    assert not workers.is_busy
    assert not is_done(run)
    assert CheckpointFolder(run.run_dir / "checkpoints").last() < 600
    assert carry_out(run)
    train(dataclasses.replace(run, run_dir=tmp_path / "uninterrupted"))
    expected = weights_of(tmp_path / "uninterrupted")
    assert all(torch.equal(weights_of(run.run_dir)[name], expected[name]) for name in expected)


def leave_a_file_in_the_way(run_dir):
    (run_dir / "mine.txt").write_text("in the way")


def damage_config(run_dir):
    (run_dir / "config.json").write_text('{"steps": ')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(leave_a_file_in_the_way, "exists already"), (damage_config, "cannot read")],
)
def test_a_failing_run_stops_no_other_and_is_named(hopper_id, tmp_path, spoil, message):
    spoiled = tmp_path / hopper_id / "mingru-s0"
    spoiled.mkdir(parents=True)
    spoil(spoiled)
    with start_study(tmp_path, hopper_id, "--workers", "2", seeds=2, steps=4) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, errors
    name = f"{hopper_id}/mingru-s0"
    log = (tmp_path / f"{name}.log").read_text()
    last = log.strip().splitlines()[-1]
    assert message in last
    assert f"FAILED   {name}: {last[:300]}" in output
    assert "1 of 2 done, 0 running, 1 failed" in output
    assert f"done     {hopper_id}/mingru-s1" in output
    assert RunFolder(tmp_path / hopper_id / "mingru-s1").is_finished()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_all_workers_which_save(hopper_id, tmp_path, number):
    two = ("--workers", "2")
    with start_study(tmp_path, hopper_id, *two, seeds=3, steps=1_000_000) as process:
        assert_a_study_stops_and_saves(process, tmp_path / hopper_id, number, PATIENCE)


def test_workers_save_and_stop_when_the_study_is_killed(hopper_id, tmp_path):
    path = tmp_path / hopper_id / "mingru-s0"
    with start_study(tmp_path, hopper_id, seeds=1, steps=1_000_000) as process:
        wait_until(lambda: step_of(path))
        process.kill()
    wait_until(lambda: "and saved" in path.with_suffix(".log").read_text())
    assert CheckpointFolder(path / "checkpoints").last() >= step_of(path)


def test_two_at_work_on_one_run_take_turns(hopper_id, tmp_path):
    run = make_config(hopper_id, tmp_path / "run", **LONG | {"steps": 60})
    pair = [LocalWorkers([run], workers=1, threads=1) for _ in range(2)]
    ended = []

    def both_ended():
        ended.extend(outcome for workers in pair for outcome in workers.poll())
        return len(ended) == 2

    wait_until(both_ended)
    assert ended == [(run, None)] * 2
    rows = [row["step"] for row in RunFolder(run.run_dir).read_metrics() if "train/loss" in row]
    assert rows == list(range(10, 61, 10))


def test_studies_in_one_folder_each_train_their_seeds(hopper_id, tmp_path):
    with contextlib.ExitStack() as both:
        studies = [
            both.enter_context(
                start_study(tmp_path, hopper_id, "--first-seed", first, seeds=1, steps=20)
            )
            for first in ("0", "1")
        ]
        ends = [process.wait(PATIENCE) for process in studies]
    assert ends == [0, 0]
    runs = [RunFolder(tmp_path / hopper_id / f"mingru-s{seed}") for seed in (0, 1)]
    assert all(run.is_finished() for run in runs)


def test_a_worker_uses_the_threads_it_is_given(hopper_id, tmp_path):
    run = make_config(hopper_id, tmp_path / "run", **LONG | {"steps": 4})
    workers = LocalWorkers([run], workers=1, threads=1)
    wait_until(lambda: workers.poll() == [(run, None)])
    assert log_of(run).exists()
    folder = CheckpointFolder(run.run_dir / "checkpoints")
    assert folder.trainer_state(folder.last())["threads"] == 1
