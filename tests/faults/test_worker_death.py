"""Evaluations whose environments kill, stop, leave or hang their process, or answer nonsense."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from faulty_environment import BAD_EPISODE, DEADLY, Steady
from processes import marked_processes, wait_until_gone

from minrl import DecisionAgent, TrajectoryModel, cli
from minrl.agents.model_config import ModelConfig
from minrl.envs import workers
from minrl.envs.rollout import evaluate
from minrl.errors import EnvError, EvaluationError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import quick

EPISODES, ROWS = 12, 3
SECONDS = 2.0  # the timeout of environments that hang, and of what goes well on a busy machine
GRACE = 5.0

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


@pytest.fixture
def mark(monkeypatch):
    """A word in the environment of every process that a test starts."""
    word = uuid.uuid4().hex
    monkeypatch.setenv("MINRL_TEST_MARK", word)
    return word


def seconds_since(file):
    """Seconds since an environment came to its fault; a start may take long on a busy machine."""
    return time.time() - file.stat().st_mtime


def run(name, num_workers=1, timeout=60.0, **options):
    options = {"episodes": EPISODES, "num_envs": ROWS, **options}
    return evaluate(Steady(), name, num_workers=num_workers, timeout=timeout, **options)


def over_before(lengths, place):
    """Episodes that were over before the fault, and those that ended in the very same step.

    Rows step together: an episode's last step is the sum of the lengths of its row so far.
    """
    last_steps = {e: lengths[e % ROWS : e + 1 : ROWS].sum() - 1 for e in range(EPISODES)}
    fault = last_steps[BAD_EPISODE - ROWS] + (3 if place == "step" else 0)
    before = {e for e, step in last_steps.items() if step < fault} | {BAD_EPISODE - ROWS}
    return before, {e for e, step in last_steps.items() if step == fault}


KILLED = "is lost: its process was killed by {} while taking a step"
LATE = f"is lost: its process gave no answer in {SECONDS:g} s while {{}}"


@pytest.mark.parametrize(
    ("fault", "where", "num_workers", "message"),
    [
        ("SIGKILL", "step", 2, KILLED.format("SIGKILL")),
        pytest.param("SIGSTOP", "step", 1, LATE.format("taking a step"), marks=slow),
        ("segfault", "step", 1, KILLED.format("SIGSEGV")),
        ("os._exit", "step", 1, "is lost: its process ended with exit status 3"),
        ("fork", "step", 1, KILLED.format("SIGKILL")),
        pytest.param("signal 40", "step", 1, KILLED.format("signal 40"), marks=slow),
        pytest.param("sys.exit", "step", 1, r"take action \[.*\]: SystemExit", marks=slow),
        pytest.param("stuck", "reset", 1, LATE.format("starting an episode"), marks=slow),
        pytest.param("observation", "step", 1, r"is not finite at index \[1\]", marks=slow),
        pytest.param("SIGKILL", "reset", 2, "SIGKILL while starting an episode", marks=slow),
        pytest.param("SIGSTOP", "reset", 2, LATE.format("starting an episode"), marks=slow),
        pytest.param("os._exit", "reset", 1, "ended with exit status 3", marks=slow),
        pytest.param("sys.exit", "reset", 1, r"cannot be started: SystemExit", marks=slow),
        pytest.param("sleep", "step", 2, LATE.format("taking a step"), marks=slow),
        pytest.param("sleep", "reset", 1, LATE.format("starting an episode"), marks=slow),
        pytest.param("stuck", "step", 1, LATE.format("taking a step"), marks=slow),
        pytest.param("raise", "step", 2, r"OSError\('simulator crashed'\)", marks=slow),
        pytest.param("raise", "reset", 2, "cannot be started: OSError", marks=slow),
        pytest.param("reward", "step", 1, "gave the reward nan", marks=slow),
        pytest.param("shape", "step", 1, r"shape \(1,\), but its space says \(2,\)", marks=slow),
        pytest.param("nothing", "step", 1, "is not an array of numbers", marks=slow),
        pytest.param("tensor", "step", 1, r"array of numbers: use detach\(\) first", marks=slow),
    ],
)
def test_a_lost_environment_costs_no_finished_episode_and_no_time(
    faulty, mark, tmp_path, capfd, fault, where, num_workers, message, new_children
):
    sound = run(faulty(), 0)
    gymnasium.registry.pop("Faulty-v0")
    heard = {}
    name = faulty(fault=fault, where=where, helper=True, mark=str(tmp_path / "fault"))
    with pytest.raises(EvaluationError) as caught:
        run(
            name,
            num_workers,
            timeout=SECONDS,
            on_episode=lambda *report: heard.setdefault(report[0], report[1:]),
        )
    if fault in DEADLY:
        assert seconds_since(tmp_path / "fault") < SECONDS + GRACE

    step = 2 if where == "step" else 0
    place = rf"environment 'Faulty-v0', episode {BAD_EPISODE}, step {step} "
    assert caught.match(place + ".*" + message)
    finished = caught.value.finished
    surely, perhaps = over_before(sound.lengths, where)
    assert surely <= set(finished) <= surely | perhaps
    assert len(surely) >= 2
    for episode, result in finished.items():
        assert result == (sound.returns[episode], sound.lengths[episode])
    assert heard == finished
    assert f"after {len(finished)} of {EPISODES} episodes" in str(caught.value)

    assert not new_children()
    assert wait_until_gone(mark, GRACE)  # the helpers too, which the system has to bury
    output, errors = capfd.readouterr()
    assert output == ""
    if fault == "segfault":  # where it happened
        assert "Segmentation fault" in errors
        assert "faulty_environment.py" in errors
    else:
        assert errors == ""


@pytest.mark.parametrize(
    "signal_number",
    [
        signal.SIGSTOP,
        pytest.param(signal.SIGKILL, marks=slow),
        pytest.param(signal.SIGTERM, marks=slow),
    ],
)
def test_a_worker_that_is_killed_or_stopped_from_outside_is_noticed(
    faulty, signal_number, new_children
):
    class Assassin(Steady):
        def act(self, observations, rewards=None):
            if self.counts[0] == 2:
                (pid,) = new_children()
                os.kill(int(pid), signal_number)
            return super().act(observations, rewards)

    assert not new_children()
    late = signal_number == signal.SIGSTOP
    fate = f"gave no answer in {SECONDS:g} s" if late else f"was killed by {signal_number.name}"
    with pytest.raises(EvaluationError, match=f"episode 0, step 2 is lost: its process {fate}"):
        evaluate(Assassin(), faulty(), episodes=3, num_workers=1, timeout=SECONDS)
    assert not new_children()


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("raise", r"OSError\('simulator crashed'\)"),
        ("sleep", f"its process gave no answer in {SECONDS:g} s"),
        pytest.param("os._exit", "its process ended with exit status 3", marks=slow),
    ],
)
def test_an_environment_that_cannot_close_costs_a_warning_and_no_result(
    faulty, mark, tmp_path, fault, problem, new_children
):
    name = faulty(fault=fault, where="close", helper=True, mark=str(tmp_path / "fault"))
    with pytest.warns(RuntimeWarning, match=f"'Faulty-v0' was not closed properly.*{problem}"):
        result = run(name, 1, timeout=SECONDS)
    assert seconds_since(tmp_path / "fault") < SECONDS + GRACE
    gymnasium.registry.pop(name)
    assert np.array_equal(result.returns, run(faulty(), 0).returns)
    assert not new_children()
    assert wait_until_gone(mark, GRACE)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        pytest.param("raise", r"cannot be made: OSError\('simulator crashed'\)", marks=slow),
        ("SIGKILL", "'Faulty-v0' cannot be made: its process was killed by SIGKILL"),
        pytest.param("sleep", "cannot be made: its process gave no answer in 2 s", marks=slow),
    ],
)
def test_an_environment_that_cannot_be_made_is_named(
    faulty, mark, monkeypatch, fault, message, new_children
):
    if fault == "sleep":
        monkeypatch.setattr(workers, "_START_SECONDS", 2.0)
    with pytest.raises(EnvError, match=message):
        run(faulty(fault=fault, where="init"), 2, timeout=SECONDS)
    assert not new_children()
    assert wait_until_gone(mark, GRACE)


def test_an_agent_that_fails_leaves_no_worker(faulty, new_children):
    class Fails(Steady):
        def act(self, observations, rewards=None):
            if self.counts[0] == 2:
                raise ZeroDivisionError
            return super().act(observations, rewards)

    with pytest.raises(ZeroDivisionError):
        evaluate(Fails(), faulty(), episodes=3, num_workers=1)
    assert not new_children()


def test_the_command_prints_what_was_finished_and_fails(faulty, tmp_path, capsys):
    name, path = faulty(), tmp_path / "run"
    config = quick(("any-v0",))
    config = dataclasses.replace(config, run_dir=path, environment=name, targets=(5.0,))
    info = {"step": 3, "environment": name, "dataset": {}, "training": config.to_json()}
    model = TrajectoryModel(2, 1, ModelConfig(width=8, num_layers=1))
    window = {"refresh_every": 1, "context": 4}  # plain PyTorch, there at once
    agent = DecisionAgent(model, target_return=5.0, info=info, **window)
    RunFolder.create(config).checkpoints.save(3, model.state_dict(), agent.header(), {})
    settings = {"episodes": EPISODES, "num_envs": ROWS, "seed": 0}
    sound = evaluate(agent, name, **settings)
    gymnasium.registry[name].kwargs = {"fault": "SIGKILL", "episode": BAD_EPISODE}

    flags = [f"--{flag.replace('_', '-')}={value}" for flag, value in settings.items()]
    flags += ["--num-workers=2", "--timeout=30", "--checkpoint=last"]
    assert cli.main(["evaluate", str(path), *flags]) == 2
    output, errors = capsys.readouterr()
    surely, perhaps = over_before(sound.lengths, "step")
    lines = {
        e: f"finished: episode {e}, return {sound.returns[e]:.1f}, {sound.lengths[e]} steps"
        for e in sorted(surely | perhaps)
    }
    for episode in surely:
        assert lines[episode] in output
    assert set(re.findall("^finished: .*", output, re.MULTILINE)) <= set(lines.values())
    place = f"environment 'Faulty-v0', episode {BAD_EPISODE}, step 2 is lost"
    assert re.search(rf"minrl: error: {place}: its process was killed by SIGKILL", errors)
    assert not (path / "evaluations.jsonl").exists()


PROGRAM = """
import gymnasium, signal, sys
from faulty_environment import Steady
from minrl.envs.rollout import evaluate

gymnasium.register("Faulty-v0", entry_point="faulty_environment:Faulty", max_episode_steps=100,
    kwargs={"fault": sys.argv[1], "episode": 4, "mark": sys.argv[2], "helper": True})
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
evaluate(Steady(), "Faulty-v0", episodes=9, num_envs=3, num_workers=2, timeout=None)
"""


# It lacks what tells workers of the end of their parent; there a shell each waits for that.
LIKE_MACOS = "import fcntl\ndel fcntl.F_SETSIG\n"


@pytest.mark.parametrize(
    ("number", "fault", "before"),
    [
        (signal.SIGINT, "sleep", ""),
        (signal.SIGKILL, "stuck", ""),
        pytest.param(signal.SIGINT, "SIGSTOP", "", marks=slow),
        pytest.param(signal.SIGINT, "stuck", "", marks=slow),
        pytest.param(signal.SIGTERM, "stuck", "", marks=slow),
        pytest.param(signal.SIGKILL, "sleep", "", marks=slow),
        pytest.param(signal.SIGKILL, "SIGSTOP", "", marks=slow),
        pytest.param(signal.SIGKILL, "stuck", LIKE_MACOS, marks=slow, id="macos-stuck"),
        pytest.param(signal.SIGKILL, "SIGSTOP", LIKE_MACOS, marks=slow, id="macos-stopped"),
    ],
)
def test_no_worker_outlives_an_interrupted_or_killed_parent(tmp_path, mark, number, fault, before):
    here = Path(__file__).parent
    (tmp_path / "sitecustomize.py").write_text(before)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(tmp_path)])}
    command = [sys.executable, "-c", PROGRAM, fault, str(tmp_path / "stuck")]
    parent = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while not (tmp_path / "stuck").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert len(marked_processes(mark)) == 6 + 2 * bool(before)  # parent, 2 workers, 3 helpers
    time.sleep(0.1)  # for the worker to come from saying that it will hang to hanging
    os.killpg(parent.pid, number)  # as a terminal does
    _, errors = parent.communicate(timeout=60)
    assert parent.returncode == -number
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert wait_until_gone(mark, GRACE)
