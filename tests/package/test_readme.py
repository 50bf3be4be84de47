"""The README's programs, run as they stand but for how long they train."""

import contextlib
import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.model_config import CONDITIONS
from minrl.cli import main
from minrl.scripts.train_config import quick

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SMALL = "--steps 4 --eval-episodes 1 --final-episodes 1 --width 8 --num-layers 1"


def programs_of(title):
    section = README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


PROGRAMS = programs_of("Use the backbone in your own agent")
# Each program's library; PufferLib's adapter needs nothing of the package.
LIBRARIES = ["torch", "torchrl", "sb3_contrib", "ray", "tianshou", "torch", "amago"]


def test_every_library_has_its_program():
    assert len(PROGRAMS) == len(LIBRARIES)
    for program, library in zip(PROGRAMS, LIBRARIES, strict=True):
        assert library in program


def test_acting_in_many_environments_asks_each_for_its_own_return():
    program = programs_of("Use from Python")[1]
    assert "make_vec" in program
    agent = DecisionAgent(TrajectoryModel(11, 3), target_return=1.0)
    names = {"agent": agent, "gym": gymnasium}
    # Episodes of an untrained agent end after about twenty steps.
    exec(program.replace("range(1000)", "range(60)"), names)  # noqa: S102 - our own
    lengths = agent._state.timesteps + 1
    assert ((lengths < 60) & ~agent._starts.flags).any()
    assert (agent._state.asked_for == 3400).all()


def test_evaluating_with_stable_baselines3(capsys):
    pytest.importorskip("stable_baselines3")
    program = programs_of("Use from Python")[2]
    agent = DecisionAgent(TrajectoryModel(11, 3), target_return=1.0)
    exec(program, {"agent": agent})  # noqa: S102 - our own
    mean, deviation = map(float, re.findall(r"-?\d+\.\d+", capsys.readouterr().out))
    assert 1 < mean < 500  # an untrained agent falls soon
    assert deviation >= 0
    assert agent.target_return == 3400


@pytest.mark.integration
def test_training_and_acting_from_python(hopper_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, whole = programs_of("Use from Python")[0], 'quick(("minrl/hopper/medium-expert-v0",))'
    assert whole in program
    options = {"steps": 4, "eval_episodes": 1, "final_episodes": 1}
    names = {"small": dataclasses.replace(quick((hopper_id,)), **options)}
    exec(program.replace(whole, "small"), names)  # noqa: S102 - our own
    assert names["done"]
    assert (names["run"] / "learning_curve.png").exists()


@pytest.mark.integration
def test_data_of_ones_own(datasets_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = programs_of("Data")
    exec(program, {})  # noqa: S102 - our own
    section = README.partition("\n## Data\n")[2]
    for line in re.findall(r"^    minrl (.*)$", section, re.MULTILINE)[:2]:
        small = SMALL if line.startswith("train") else ""
        assert main(shlex.split(f"{line} {small}")) == 0
    (run,) = tmp_path.glob("runs/me/pendulum/random-v0/mingru-s0-*")
    assert (run / "learning_curve.png").exists()


@pytest.mark.integration
@pytest.mark.parametrize("condition", CONDITIONS)
def test_an_exported_policy_runs_without_minrl(hopper_id, tmp_path, monkeypatch, condition):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    told = f"--dataset {hopper_id} --condition {condition}"
    assert main(shlex.split(f"train {told} --run-dir run {SMALL}")) == 0
    assert main(shlex.split("export run --to onnx --output policy.onnx")) == 0
    (program,) = programs_of("An exported policy")
    assert "minrl" not in re.findall(r"^(?:import|from) .*$", program, re.MULTILINE)[0]
    names = {}
    exec(program, names)  # noqa: S102 - our own
    assert names["done"]
    counted_down = names["wanted"] < names["told"]["target_return"]
    assert counted_down == (condition == "return-to-go")


def test_the_commands_have_the_flags_that_are_named(capsys):
    text = README.replace("\\|", "|")  # as tables write it
    lines = re.findall(r"(?:^|`)(?: {4})?minrl ([a-z][^`\n]*)", text, re.MULTILINE)
    assert len(lines) > 20
    for line in lines:
        command, *words = line.split()
        kinds = words[0].split("|") if command in ("datasets", "benchmark") and words else []
        for kind in kinds or [None]:
            with contextlib.suppress(SystemExit):
                main([command, *filter(None, [kind]), "--help"])
            output = capsys.readouterr()
            assert "--help" in output.out, (line, output.err)
            for flag in re.findall(r"--[a-z0-9][a-z0-9-]*", line):
                assert flag in output.out, line


@pytest.mark.integration
@pytest.mark.parametrize("index", range(len(LIBRARIES)))
def test_programs_run_as_they_stand(index, tmp_path):
    library = LIBRARIES[index]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    environment = {"HOME": str(tmp_path), "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment["RAY_ADDRESS"] = "local"  # whatever cluster is, or was, on this machine
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[index]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
