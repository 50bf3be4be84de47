"""The README's programs for other libraries, run as they stand."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest

from minrl import DecisionAgent, TrajectoryModel

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Use the backbone in your own agent")[2].partition("\n## ")[0]
PROGRAMS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
# Each program's library; PufferLib's adapter needs nothing of the package.
LIBRARIES = ["torch", "torchrl", "sb3_contrib", "ray", "tianshou", "torch", "amago"]


def test_every_library_has_its_program():
    assert len(PROGRAMS) == len(LIBRARIES)
    for program, library in zip(PROGRAMS, LIBRARIES, strict=True):
        assert library in program


def test_acting_in_many_environments_asks_each_for_its_own_return():
    section = README.partition("## Use from Python")[2].partition("\n## ")[0]
    program = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert "make_vec" in program
    agent = DecisionAgent(TrajectoryModel(11, 3), target_return=1.0)
    names = {"agent": agent, "gym": gymnasium}
    # Episodes of an untrained agent end after about twenty steps.
    exec(program.replace("range(1000)", "range(60)"), names)  # noqa: S102 - our own
    lengths = agent._state.timesteps + 1
    assert ((lengths < 60) & ~agent._starts.flags).any()
    assert (np.abs(agent._state.returns_to_go - 3400) < 5 * lengths + 5).all()


@pytest.mark.integration
@pytest.mark.parametrize("index", range(len(LIBRARIES)))
def test_programs_run_as_they_stand(index, tmp_path):
    library = LIBRARIES[index]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    environment = {"HOME": str(tmp_path), "PATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[index]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
