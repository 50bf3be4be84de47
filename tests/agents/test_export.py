"""Exported files act as the agent does, and a process without minrl can run them."""

import json
import subprocess
import sys
import textwrap
import zipfile

import numpy as np
import pytest
import torch

from minrl import DecisionAgent, TrajectoryModel, cli
from minrl.agents.export import description, export_agent
from minrl.agents.model_config import ModelConfig
from minrl.errors import ConfigError, ExportError

pytestmark = pytest.mark.integration

# torch.export and ONNX Runtime, without minrl.
RUN = {
    "pt2": """
        import torch
        told = {"minrl.json": ""}
        policy = torch.export.load(path, extra_files=told).module()
        told = json.loads(told["minrl.json"])
        def step(*inputs):
            with torch.inference_mode():
                return [x.numpy() for x in policy(*map(torch.from_numpy, inputs))]
    """,
    "onnx": """
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        told = json.loads(session.get_modelmeta().custom_metadata_map["minrl"])
        def step(*inputs):
            return session.run(["action", "next_state"], dict(zip(told["inputs"], inputs)))
    """,
}
ROLLOUT = """
import json, sys
import numpy as np
sys.modules["minrl"] = None  # importing it fails
path, *files = sys.argv[1:]
{load}
for file in files:
    episode = np.load(file)
    rewards, starts = episode["rewards"], episode["starts"]
    batch = starts.shape[1]
    state = np.zeros((batch, told["inputs"]["state"][1][1]), np.float32)
    returns, timesteps, actions = np.zeros(batch), np.zeros(batch, np.int64), []
    for t, observations in enumerate(episode["observations"]):
        spent = rewards[t] if told["model"]["condition"] == "return-to-go" else 0.0
        returns = np.where(starts[t], told["target_return"], returns - spent)
        timesteps = np.where(starts[t], 0, timesteps + 1)
        inputs = returns.astype(np.float32), timesteps, starts[t], state
        action, state = step(observations, *inputs)
        actions.append(action)
    np.save(file.replace("npz", "npy"), actions)
"""

KINDS = {
    "joint-mingru": {},
    "interleaved-minlstm-convolution": {
        "tokens": "interleaved",
        "backbone": "minlstm",
        "convolution": 4,
    },
    "joint-unnormalised-identity": {
        "backbone": "minlstm",
        "normalize": False,
        "candidate": "identity",
        "mlp_ratio": 0,
    },
    "joint-transformer": {"backbone": "transformer", "attention_context": 5},
    "interleaved-tanh-expanded": {"tokens": "interleaved", "candidate": "tanh", "expansion": 2},
    "by-default": {"condition": "return", "max_timestep": 0},
}


def make_agent(kind="joint-mingru", **options):
    torch.manual_seed(0)
    config = {"width": 16, "num_layers": 2, "condition": "return-to-go", "max_timestep": 30}
    model = TrajectoryModel(5, 2, ModelConfig(**config | KINDS[kind]))
    for name, parameter in model.named_parameters():
        if "bias_h0" in name:
            torch.nn.init.normal_(parameter)
    model.observation_mean.copy_(torch.randn(5))
    model.observation_std.copy_(torch.rand(5) + 0.5)
    model.action_low.copy_(torch.tensor([-1.0, 0.25]))
    model.action_high.copy_(torch.tensor([3.0, 0.25]))
    return DecisionAgent(model, target_return=700.0, **options)


def rollouts_without_minrl(path, to, episodes, tmp_path):
    """Run an artefact through episodes in a process that cannot import minrl."""
    program = tmp_path / "program.py"
    program.write_text(ROLLOUT.format(load=textwrap.dedent(RUN[to])))
    files = [tmp_path / f"{index}.npz" for index in range(len(episodes))]
    for file, episode in zip(files, episodes, strict=True):
        np.savez(file, **episode)
    subprocess.run([sys.executable, program, path, *files], check=True, cwd=tmp_path)
    return [np.load(file.with_suffix(".npy")) for file in files]


def make_episode(batch, steps=60):
    generator = np.random.default_rng(batch)
    starts = generator.random((steps, batch)) < 0.05
    starts[0] = True
    return {
        "observations": generator.normal(size=(steps, batch, 5)).astype(np.float32),
        "rewards": generator.normal(size=(steps, batch)) * 30,
        "starts": starts,
    }


def act_through(agent, episode):
    agent.reset(num_envs=episode["starts"].shape[1])
    actions = []
    for observations, rewards, starts in zip(*episode.values(), strict=True):
        agent.reset(starts)
        actions.append(agent.act(observations, rewards))
    return np.stack(actions)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("kind", "to"),
    [
        ("joint-mingru", "onnx"),
        ("interleaved-minlstm-convolution", "pt2"),
        ("joint-transformer", "onnx"),
        ("joint-transformer", "pt2"),
        ("by-default", "onnx"),
        ("by-default", "pt2"),
        *(
            pytest.param(kind, to, marks=pytest.mark.slow)
            for kind, to in (
                ("joint-mingru", "pt2"),
                ("interleaved-minlstm-convolution", "onnx"),
                ("joint-unnormalised-identity", "onnx"),
                ("joint-unnormalised-identity", "pt2"),
                ("interleaved-tanh-expanded", "onnx"),
                ("interleaved-tanh-expanded", "pt2"),
            )
        ),
    ],
)
def test_a_process_without_minrl_acts_as_the_agent(kind, to, tmp_path):
    agent = make_agent(kind)
    path = tmp_path / f"policy.{to}"
    assert export_agent(agent, path, to) <= 1e-5
    assert_no_paths_in(path)
    episodes = [make_episode(batch) for batch in (1, 4)]
    for episode, actions in zip(
        episodes, rollouts_without_minrl(path, to, episodes, tmp_path), strict=True
    ):
        assert actions.dtype == np.float32
        assert np.abs(actions - act_through(agent, episode)).max() <= 1e-5


def assert_no_paths_in(path):
    """Stack traces in the file would show the folders of the machine that wrote it."""
    content = path.read_bytes()
    if path.suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            content = b"".join(archive.read(name) for name in archive.namelist())
    for trace in (str(path.parent).encode(), b"site-packages", b"trajectory.py"):
        assert trace not in content


def test_the_description_is_complete_and_names_this_agent():
    agent = make_agent()
    agent.info = {"step": 7, "environment": "X-v0", "dataset": {"dataset_id": "x"}}
    told = json.loads(json.dumps(description(agent)))
    assert told["inputs"]["state"] == ["float32", ["batch", 2 * 16 + 2]]
    assert told["outputs"]["action"] == ["float32", ["batch", 2]]
    assert (told["target_return"], told["step"], told["environment"]) == (700.0, 7, "X-v0")
    assert told["action_high"] == [3.0, 0.25]
    assert "then less by the reward of each step" in told["how_to"]
    assert "then one more each step" in told["how_to"]
    by_default = description(make_agent("by-default"))["how_to"]
    assert "then the same at every step" in by_default
    assert "timestep: not looked at" in by_default


def test_a_file_that_acts_differently_is_refused_and_not_left(tmp_path, monkeypatch):
    agent = make_agent()
    act = DecisionAgent.act
    monkeypatch.setattr(DecisionAgent, "act", lambda *inputs: act(*inputs) + np.float32(2e-5))
    with pytest.raises(ExportError, match="acts differently from the model, by up to"):
        export_agent(agent, tmp_path / "policy.pt2", "pt2")
    assert not list(tmp_path.iterdir())


def test_differences_are_measured_in_halves_of_the_range_of_actions(tmp_path, monkeypatch):
    agent = make_agent()
    agent.model.action_low.fill_(-100.0)
    agent.model.action_high.fill_(100.0)
    act = DecisionAgent.act
    monkeypatch.setattr(DecisionAgent, "act", lambda *inputs: act(*inputs) + np.float32(5e-4))
    assert 2e-6 < export_agent(agent, tmp_path / "policy.pt2", "pt2") <= 1e-5


def test_a_model_in_training_is_exported_without_dropout_and_left_in_training(tmp_path):
    torch.manual_seed(0)
    model = TrajectoryModel(5, 2, ModelConfig(width=16, num_layers=1, dropout=0.5))
    agent = DecisionAgent(model, target_return=700.0)
    model.train()
    assert export_agent(agent, tmp_path / "policy.pt2", "pt2") <= 1e-5
    assert model.training
    assert model.embedding_dropout.training


def test_what_cannot_be_exported_is_refused(tmp_path):
    windowed = make_agent(refresh_every=4, context=6)
    with pytest.raises(ConfigError, match=r"every 4 steps.*--recurrent"):
        export_agent(windowed, tmp_path / "policy.onnx", "onnx")
    with pytest.raises(ConfigError, match="to must be one of onnx, pt2, not 'tflite'"):
        export_agent(make_agent(), tmp_path / "policy.tflite", "tflite")
    with pytest.raises(ConfigError, match=r"must end in \.onnx, not 'policy\.pt2'"):
        export_agent(make_agent(), tmp_path / "policy.pt2", "onnx")
    with pytest.raises(ConfigError, match=r"there is no folder .*nosuch"):
        export_agent(make_agent(), tmp_path / "nosuch" / "policy.pt2", "pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ExportError, match=r"onnxscript is missing.*pip install onnx onnxscript"):
        export_agent(make_agent(), tmp_path / "policy.onnx", "onnx")
    assert not list(tmp_path.iterdir())


def test_the_command_exports_a_saved_agent(tmp_path, capsys):
    make_agent(refresh_every=2, context=4).save(tmp_path / "agent.safetensors")
    arguments = ["export", str(tmp_path / "agent.safetensors"), "--to", "pt2"]
    assert cli.main(arguments) == 2
    assert "every 2 steps" in capsys.readouterr().err
    assert cli.main([*arguments, "--recurrent"]) == 0
    assert "acts as the model does: largest difference" in capsys.readouterr().out
    assert (tmp_path / "policy.pt2").exists()
