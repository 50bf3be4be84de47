import dataclasses
import io
import json
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco import MujocoEnv

from minrl.agents.checkpoint import CheckpointFolder, load_weights
from minrl.data.windows import WindowSampler
from minrl.errors import ConfigError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.study import study, wait_for
from minrl.scripts.study_progress import Progress
from minrl.scripts.study_run import carry_out, is_done, log_of
from minrl.scripts.study_workers import LocalWorkers, last_line

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def finished(hopper_id, tmp_path_factory, plan):
    """A run of a study that nothing interrupted."""
    (run,) = plan(tmp_path_factory.mktemp("study"))
    assert carry_out(run)
    return run


def copy_of(run, folder):
    copied = dataclasses.replace(run, run_dir=folder / run.run_dir.name)
    shutil.copytree(run.run_dir, copied.run_dir)
    return copied


def results_of(run):
    """Return all that a run comes to: weights, losses and scores by step, final evaluations."""
    folder = CheckpointFolder(run.run_dir / "checkpoints")
    weights = {step: load_weights(folder.weights(step))[0] for step in folder.steps()}
    scores = {step: folder.header(step)["score"] for step in folder.steps()}
    rows = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in RunFolder(run.run_dir).read_metrics()
    ]
    return weights, scores, rows, RunFolder(run.run_dir).read_evaluations()


def assert_same_results(run, expected):
    weights, *rest = results_of(run)
    expected_weights, *expected_rest = results_of(expected)
    assert rest == expected_rest
    assert weights.keys() == expected_weights.keys()
    for step, tensors in expected_weights.items():
        for name, value in tensors.items():
            assert torch.equal(weights[step][name], value)


def test_runs_with_other_settings_are_not_mixed(finished, plan):
    folder = finished.run_dir.parents[3]
    assert plan(folder) == [finished]
    with pytest.raises(ConfigError, match=r"mingru-s0 is a run with width 16, not 8: choose ano"):
        plan(folder, more=("width=8",))
    with pytest.raises(ConfigError, match="is a run with steps 12, not 20"):
        plan(folder, more=("steps=20",))
    with pytest.raises(ConfigError, match=r"with targets \[\d+.0, \d+.0\], not \[3.0\]"):
        plan(folder, more=("targets=3",))
    assert len(plan(folder, more=("final-episodes=3", "device=auto"))) == 1


def test_every_backbone_gets_the_same_windows_and_start_states(
    hopper_id, tmp_path, monkeypatch, plan
):
    plain_windows, plain_reset = WindowSampler.windows, MujocoEnv.reset
    windows, starts = [], []

    def note_windows(self, step):
        windows.append(plain_windows(self, step))
        return windows[-1]

    def note_reset(self, **options):
        observation, info = plain_reset(self, **options)
        starts.append(observation)
        return observation, info

    monkeypatch.setattr(WindowSampler, "windows", note_windows)
    monkeypatch.setattr(MujocoEnv, "reset", note_reset)
    seen = []
    for run in plan(tmp_path, backbones=("mingru", "gru", "bc"), more=("steps=5",)):
        windows.clear()
        starts.clear()
        assert carry_out(run)
        begun = RunFolder(run.run_dir).read_config()
        evaluations = results_of(run)[-1]
        asked = [(row["target_return"], row["seed"], row["episodes"]) for row in evaluations]
        seen.append((np.array(windows), np.array(starts), begun.targets, asked[:2]))
    assert len(seen[0][0]) >= 5
    # Two targets and episodes each after steps 4 and 5, and at the end; then comes the best
    # checkpoint, which is the last one of some runs, and not evaluated again.
    shared = 3 * 2 * 2
    assert len(seen[0][1]) > shared
    for other in seen[1:]:
        np.testing.assert_array_equal(other[0], seen[0][0])
        np.testing.assert_array_equal(other[1][:shared], seen[0][1][:shared])
        assert other[2:] == seen[0][2:]


def remove_evaluations(run):
    (run.run_dir / "evaluations.jsonl").unlink()


def cut_the_last_evaluation(run):
    path = run.run_dir / "evaluations.jsonl"
    path.write_text(path.read_text()[:-30])


def remove_the_last_picture(run):
    (run.run_dir / "target_vs_return.png").unlink()


def remove_the_last_score(run):
    remove_evaluations(run)
    folder = CheckpointFolder(run.run_dir / "checkpoints")
    tensors, header = load_weights(folder.weights(12))
    folder.save(12, tensors, header, folder.trainer_state(12))  # as it was before its evaluation


def remove_checkpoints(run):
    shutil.rmtree(run.run_dir / "checkpoints")


def leave_half_a_configuration(run):
    shutil.rmtree(run.run_dir)
    run.run_dir.mkdir()
    (run.run_dir / "config.json12ab.tmp").write_text("{")


def damage_the_last_checkpoint(run):
    file = run.run_dir / "checkpoints" / "step-00000012.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


STAGES = [
    remove_evaluations,
    cut_the_last_evaluation,
    remove_the_last_picture,
    remove_the_last_score,
    remove_checkpoints,
    leave_half_a_configuration,
    damage_the_last_checkpoint,
]


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("undo", STAGES)
def test_a_run_that_lacks_anything_is_completed_to_the_same_result(finished, tmp_path, undo):
    run = copy_of(finished, tmp_path)
    assert is_done(run)
    undo(run)
    assert not is_done(run)
    assert carry_out(run)
    assert_same_results(run, finished)


def test_a_finished_run_is_not_touched(finished):
    files = [path for path in finished.run_dir.rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert carry_out(finished)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_evaluations_that_a_user_asked_for_are_kept_and_the_cut_one_is_made_again(
    finished, tmp_path
):
    run = copy_of(finished, tmp_path)
    path = run.run_dir / "evaluations.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    own = json.loads(first) | {"seed": 3}
    path.write_text(json.dumps(own) + "\n" + "".join(others) + first[:-30])
    assert carry_out(run)
    found, expected = (RunFolder(one.run_dir).read_evaluations() for one in (run, finished))
    assert found.pop(0) == own
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_another_evaluation_by_the_user_leaves_a_run_finished(finished, tmp_path):
    run = copy_of(finished, tmp_path)
    last, *_ = RunFolder(run.run_dir).read_evaluations()
    RunFolder(run.run_dir).append_evaluation(last | {"checkpoint": "best"})
    assert is_done(run)


def test_what_a_study_was_begun_with_is_asked_for_again(hopper_id, tmp_path, plan):
    more = ("targets=-500", "return-scale=5")
    (run,) = plan(tmp_path, more=more)
    assert carry_out(run)
    assert plan(tmp_path, more=more) == [run]
    for given, name in ((more[:1], "return-scale 5"), (more[1:], r"targets \[-500")):
        with pytest.raises(ConfigError, match=f"is a run with {name}.*: choose another folder"):
            plan(tmp_path, more=given)


def test_a_folder_in_which_another_study_began_since_is_refused(hopper_id, tmp_path, plan):
    (ours,) = plan(tmp_path)
    (other,) = plan(tmp_path, more=("learning-rate=1e-5",))
    assert carry_out(other)
    with pytest.raises(ConfigError, match="is a run with learning-rate 1e-05, not"):
        carry_out(ours)


def carry_out_and_die(run, moment):
    """Carry out a run in a fork that is killed when it opens or renames its moment-th file."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    moments, inside = iter(range(moment)), str(run.run_dir)

    def die(event, arguments):
        if event in ("open", "os.rename") and str(arguments[0]).startswith(inside):
            if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                return
            if next(moments, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.stdout = sys.stderr = io.StringIO()
    sys.addaudithook(die)
    done = carry_out(run)
    os._exit(0 if done else 1)


def kill_at(moments, run, expected):
    for moment in moments:
        if carry_out_and_die(run, moment) == 0:
            break
        assert not is_done(run)
    assert carry_out(run)
    assert_same_results(run, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_again_and_again_it_comes_to_the_same_result(finished, tmp_path):
    run = dataclasses.replace(finished, run_dir=tmp_path / "run")
    kill_at((1, 9, 23, 31, 44), run, finished)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_file_it_writes_it_comes_to_the_same_result(finished, tmp_path):
    for moment in range(200):
        run = dataclasses.replace(finished, run_dir=tmp_path / f"run-{moment}")
        status = carry_out_and_die(run, moment)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert carry_out(run)
        assert_same_results(run, finished)
    assert 30 < moment < 199


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_steps_scores_and_totals(finished):
    folder = finished.run_dir.parents[3]
    waiting = dataclasses.replace(finished, run_dir=finished.run_dir.with_name("x-s0"), steps=8)
    log = io.StringIO()
    progress = Progress([finished, waiting], [waiting], folder, log)
    progress.show([waiting])
    progress.show([waiting])
    progress.ended(waiting, "out of memory")
    progress.close()
    lines = log.getvalue().splitlines()
    name = waiting.run_dir.relative_to(folder).as_posix()
    assert lines == [
        f"2 runs in {folder}, 1 of them finished already",
        f"started  {name}  step 0 of 8  [1 of 2 done, 1 running, 0 failed, time left ?]",
        f"failed   {name}: out of memory",
        "1 of 2 done, 0 running, 1 failed, time left 0:00:00",
        f"FAILED   {name}: out of memory",
    ]
    terminal = Terminal()
    progress = Progress([finished], [], folder, terminal)
    progress.show([finished])
    progress.show([])
    run = RunFolder(finished.run_dir)
    tag = f"eval/{run.read_config().targets[0]:g}/normalized_score_mean"
    score = [row[tag] for row in run.read_metrics() if tag in row][-1]
    shown = terminal.getvalue().splitlines()
    assert shown[1].startswith("1 of 1 done, 1 running")
    assert shown[2].endswith(f"mingru-s0  step 12 of 12  score {score:.1f}")
    assert shown[3].startswith("\x1b[2F\x1b[J1 of 1 done, 0 running")


def test_a_run_that_ends_while_the_study_stops_is_counted(finished, tmp_path):
    run, log = copy_of(finished, tmp_path), io.StringIO()
    workers, progress = LocalWorkers([run], 1, 1), Progress([run], [run], tmp_path, log)
    workers.poll()
    wait_for(workers, progress)
    assert log.getvalue().splitlines()[1].startswith("done     ")


def test_the_last_line_of_a_log_is_what_a_progress_bar_shows_last(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"data\n\r 1 %\r 2 %  \n\n")
    assert last_line(log) == "2 %"
    assert last_line(tmp_path / "none") == ""


def test_a_finished_study_starts_nothing(finished, capsys, small_study):
    assert study(small_study(finished.run_dir.parents[3])) == 0
    assert "1 runs in" in capsys.readouterr().out
    assert not log_of(finished).exists()
