import os
import re
import subprocess
import sys

import numpy as np
import pytest

from minrl import cli
from minrl.scripts import imports

MODULE = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

gymnasium.register("Mine-v0", PendulumEnv, max_episode_steps=10)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The working folder, with a module of the user's own."""
    (tmp_path / "my_environments.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv(imports.VARIABLE, "")
    monkeypatch.setattr("warnings.showwarning", None)  # main replaces it
    return tmp_path


def run(*arguments):
    command = [sys.executable, "-m", "minrl", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("flags", [["--import", "first"], ["--import=first"]])
def test_named_modules_are_imported_before_the_command(flags, own, capsys, monkeypatch):
    for name in ("first", "second"):
        (own / f"{name}_own.py").write_text(f"print({name!r})")
        monkeypatch.delitem(sys.modules, f"{name}_own", raising=False)
    flags = [flag.replace("first", "first_own") for flag in flags]
    assert cli.main([*flags, "--import", "second_own", "no-command"]) == 2
    assert capsys.readouterr().out == "first\nsecond\n"
    assert os.environ[imports.VARIABLE] == "first_own,second_own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--import", "no_such_module", "doctor"],
            "--import no_such_module: it cannot be imported .ModuleNotFound",
        ),
        (["--import", "broken", "doctor"], "--import broken: it cannot .*ZeroDivisionError"),
        (["--import"], "--import needs the name of a module, and then a command"),
        (["--import", "my_environments"], "--import needs the name of a module, and then"),
        (["--import="], "--import needs the name of a module"),
    ],
)
def test_what_cannot_be_imported_is_one_line(arguments, message, own, capsys):
    (own / "broken.py").write_text("1 / 0")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.match(f"minrl: error: {message}", error)
    assert error.count("\n") == 1


@pytest.mark.integration
def test_an_environment_of_ones_own_is_imported_studied_and_evaluated(own):
    rng = np.random.default_rng(0)
    ends = np.arange(100) % 10 == 9
    np.savez(
        "mine.npz",
        observations=rng.normal(size=(100, 3)).astype(np.float32),
        actions=rng.uniform(-2, 2, (100, 1)).astype(np.float32),
        rewards=rng.normal(size=100),
        terminals=np.zeros(100, bool),
        timeouts=ends,
    )
    mine = ("--import", "my_environments")
    run(*mine, "datasets", "import", "mine.npz", "--id", "me/own-v0", "--environment", "Mine-v0")
    flags = "width=16 num-layers=1 steps=2 eval-every=2 eval-episodes=1 final-episodes=2 context=5"
    names = ("--tasks", "me/own-v0", "--backbones", "mingru", "--seeds", "1")
    run(*mine, "study", *names, "--set", *flags.split(), "--folder", "study")
    path = "study/me/own-v0/mingru-s0"
    assert "Mine-v0" in run(*mine, "evaluate", path, "--episodes", "2", "--num-workers", "1")
