"""Environments are made quietly, and refused with words that help."""

import subprocess
import sys
import warnings

import gymnasium
import mujoco
import numpy as np
import pytest
from gymnasium import spaces

from minrl.envs.make import check_spaces, make_env, quiet_mujoco
from minrl.errors import EnvError


def test_users_see_neither_warnings_nor_a_log_file(tmp_path):
    program = (
        "from minrl.envs.make import make_env\n"
        "for name in ('HalfCheetah-v5', 'HalfCheetah-v4', 'Hopper-v4', 'Walker2d-v4'):\n"
        "    environment = make_env(name)\n"
        "    environment.reset(seed=0)\n"
        "    environment.step(environment.action_space.sample())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_other_warnings_of_mujoco_still_come_out_as_python_warnings():
    def make_with_a_warning():
        with quiet_mujoco():
            mujoco.get_mju_user_warning()("something unusual")

    with pytest.warns(RuntimeWarning, match="MuJoCo: something unusual"):
        make_with_a_warning()


def test_the_handler_of_mujoco_warnings_is_restored_even_after_an_error():
    mujoco.set_mju_user_warning(print)
    try:
        with pytest.raises(KeyError), quiet_mujoco():
            raise KeyError
        assert mujoco.get_mju_user_warning() is print
    finally:
        mujoco.set_mju_user_warning(None)


@pytest.mark.parametrize(
    ("environment_id", "message"),
    [
        ("Hoper-v5", "unknown environment 'Hoper-v5': did you mean Hopper-v5"),
        ("hopper-v5", "did you mean Hopper-v5"),
        ("Hopper", "did you mean Hopper-v5"),
        ("Hopper-v9", "did you mean Hopper-v5"),
        ("xyzzy", "unknown environment 'xyzzy': gymnasium.registry has all"),
        ("", "unknown environment ''"),
        ("Mine-v0", "If it is your own, import its module first: minrl --import"),
        ("Hopper-v3", "needs software that is not installed"),
        ("os:Hopper-v5", "names a module to import, which is refused"),
    ],
)
def test_wrong_id_is_an_error_that_helps(environment_id, message):
    with pytest.raises(EnvError, match=message):
        make_env(environment_id)


def test_an_environment_in_place_of_an_id_is_refused():
    with make_env("Hopper-v5") as environment, pytest.raises(EnvError, match=r"not by <.*Hopper"):
        make_env(environment)


def test_a_module_named_in_an_id_is_not_imported():
    sys.modules.pop("this", None)
    with pytest.raises(EnvError):
        make_env("this:Hopper-v5")
    assert "this" not in sys.modules


def test_step_limit_can_be_changed():
    environment = make_env("HalfCheetah-v5", max_episode_steps=3)
    environment.reset(seed=0)
    flags = [environment.step(np.zeros(6, np.float32))[3] for _ in range(3)]
    environment.close()
    assert flags == [False, False, True]


class Spaces(gymnasium.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space


VECTOR = spaces.Box(-1.0, 1.0, (3,))


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (spaces.Dict({"a": VECTOR}), VECTOR, "observation space of kind Dict"),
        (
            spaces.Box(0, 255, (8, 8, 3), np.uint8),
            VECTOR,
            r"Box of shape \(8, 8, 3\) and type uint",
        ),
        (spaces.Discrete(4), VECTOR, "observation space of kind Discrete"),
        (VECTOR, spaces.Discrete(2), "action space of kind Discrete"),
        (VECTOR, spaces.MultiDiscrete([2, 2]), "action space of kind MultiDiscrete"),
        (VECTOR, spaces.Box(-1.0, 1.0, (2, 2)), "action space of kind Box of shape"),
        (VECTOR, spaces.Box(0, 5, (2,), np.int64), "type int64"),
    ],
)
def test_unsupported_spaces_are_named_with_what_is_supported(observation, action, message):
    with pytest.raises(EnvError, match=f"'Spaces'.*{message}.*one-dimensional Box"):
        check_spaces(Spaces(observation, action))


def test_box_spaces_pass():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_spaces(Spaces(VECTOR, VECTOR))
