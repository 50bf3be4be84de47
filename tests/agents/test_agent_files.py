import subprocess
import sys

import numpy as np
import pytest
from acting import act_through, every_kind, make_agent, make_episode

from minrl import DecisionAgent
from minrl.errors import CheckpointError, ConfigError


def test_an_agent_with_numpys_numbers_can_be_saved(tmp_path):
    numbers = {"target_return": np.float32(100), "refresh_every": np.int64(2)}
    make_agent(**numbers, context=np.int64(3)).save(tmp_path / "agent.safetensors")
    assert DecisionAgent.load(tmp_path / "agent.safetensors").target_return == 100.0


@every_kind
def test_a_saved_agent_acts_the_same(kind, tmp_path):
    agent = make_agent(kind, refresh_every=3, context=7)
    agent.info = {"step": 5, "dataset": {"dataset_id": "x"}}
    agent.save(tmp_path / "agent.safetensors")
    loaded = DecisionAgent.load(tmp_path / "agent.safetensors")
    observations, rewards = make_episode(20)
    expected = act_through(agent, observations, rewards)
    assert np.array_equal(act_through(loaded, observations, rewards), expected)
    assert loaded.info["step"] == 5
    assert (loaded.refresh_every, loaded.context, loaded.target_return) == (3, 7, 100.0)


def test_loading_an_agent_imports_no_environment_and_no_dataset_library(tmp_path):
    make_agent().save(tmp_path / "agent.safetensors")
    program = (
        "import sys; from minrl import DecisionAgent;"
        "import numpy as np;"
        "agent = DecisionAgent.load(sys.argv[1]); agent.act(np.zeros(5, np.float32));"
        "print([m for m in ('gymnasium', 'minari', 'mujoco', 'h5py', 'tensorboard', 'matplotlib')"
        " if m in sys.modules])"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "agent.safetensors")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_an_unknown_checkpoint_or_device_is_refused(tmp_path):
    make_agent().save(tmp_path / "agent.safetensors")
    with pytest.raises(ConfigError, match="device 'gpu0' cannot be used"):
        DecisionAgent.load(tmp_path / "agent.safetensors", device="gpu0")
    assert DecisionAgent.load(tmp_path / "agent.safetensors", device="auto").device.type in (
        "cpu",
        "cuda",
    )
    with pytest.raises(ConfigError, match="checkpoint must be last or best, not 'bset'"):
        DecisionAgent.load(tmp_path, checkpoint="bset")


def test_a_missing_file_and_another_models_file_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nothing\.safetensors"):
        DecisionAgent.load(tmp_path / "nothing.safetensors")
    agent = make_agent()
    header = agent.header()
    agent.header = lambda: {**header, "model": {**header["model"], "action_size": 9}}
    agent.save(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit.*the model's action_low is \(2,\)"):
        DecisionAgent.load(tmp_path / "other.safetensors")
