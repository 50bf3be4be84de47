"""Agents' files whose headers lie: refused, most of them before anything is built from them."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from minrl.agents.checkpoint import load_weights, pack_weights
from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.model_config import ModelConfig
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import CheckpointError, ConfigError

MOST_MEMORY = 256 << 20


def agent_file(path, change, **shape):
    """Write an agent's file of a few kilobytes with something else in its header."""
    model = TrajectoryModel(5, 2, ModelConfig(width=16, num_layers=1, **shape))
    DecisionAgent(model, target_return=1.0).save(path)
    tensors, header = load_weights(path)
    change(header)
    path.write_bytes(pack_weights(tensors, header))


TRANSFORMER = {"backbone": "transformer", "attention_context": 20}
NEVER_BUILT = {
    "wide": ({"width": 1 << 14}, "the model's embed_return.weight is", [{"meta"}]),
    "deep": ({"num_layers": 1 << 30}, "more layers than it has weights", []),
    "two layers": ({"num_layers": 2}, "the model has no backbone", [{"meta"}]),
    "tokens": ({"tokens": "none"}, "tokens must be one of", []),
    "text": ({"width": "wide"}, "width must be a whole number, not 'wide'", []),
    "float": ({"width": 16.0}, "width must be a whole number, not 16.0", []),
    "scale": ({"return_scale": 10**400}, "return_scale must be a number or nothing", []),
    "infinite scale": ({"return_scale": float("inf")}, "must be positive and finite", []),
    "bias": ({"forget_bias": float("nan")}, "forget_bias must be finite", []),
}


@pytest.mark.parametrize("kind", NEVER_BUILT)
def test_an_agent_that_describes_what_it_does_not_hold_is_refused_unbuilt(
    kind, tmp_path, monkeypatch
):
    fields, message, built_on = NEVER_BUILT[kind]
    path = tmp_path / "agent.safetensors"
    agent_file(path, lambda header: header["model"]["config"].update(fields))
    plain, devices = TrajectoryModel.__init__, []

    def note_devices(self, *arguments):
        plain(self, *arguments)
        devices.append({parameter.device.type for parameter in self.parameters()})

    monkeypatch.setattr(TrajectoryModel, "__init__", note_devices)
    with pytest.raises(CheckpointError, match=f"does not fit this version of minrl: .*{message}"):
        DecisionAgent.load(path)
    assert devices == built_on


NAN = float("nan")
HEADERS = {
    "attention": (lambda h: h["model"]["config"].update(attention_context=10**7), "takes about"),
    "endless attention": (
        lambda h: h["model"]["config"].update(attention_context=2**62),
        "takes about",
    ),
    "window": (
        lambda h: h["acting"].update(refresh_every=1, context=2 * 10**7),
        "a window of 20000000 steps takes about",
    ),
    "endless window": (lambda h: h["acting"].update(refresh_every=9, context=10**30), "takes"),
    "caches in turn": (
        lambda h: (
            h["model"]["config"].update(attention_context=2000),
            h["acting"].update(refresh_every=2, context=2000),
        ),
        "a window of 2000 steps takes about",
    ),
    "no window": (lambda h: h["acting"].update(context=0), "context must be a whole number from 1"),
    "window of text": (lambda h: h["acting"].update(context="20"), "context must be a whole"),
    "refresh": (lambda h: h["acting"].update(refresh_every=-1), "refresh_every must be a whole"),
    "huge target": (lambda h: h["acting"].update(target_return=10**400), "too large"),
    "nan target": (lambda h: h["acting"].update(target_return=NAN), "target_return must be a fin"),
    "infinite target": (lambda h: h["acting"].update(target_return=-NAN), "target_return must be"),
    "no target": (lambda h: h["acting"].update(target_return=None), "target_return must be a fin"),
    "no acting": (lambda h: h.pop("acting"), "'acting'"),
    "other acting": (lambda h: h.update(acting=[1]), "must be a mapping"),
    "no model": (lambda h: h.update(model=None), "not subscriptable"),
    "no config": (lambda h: h["model"].update(config=5), "not subscriptable"),
    "sizes": (lambda h: h["model"].update(observation_size=-1), "negative dimension"),
    "dataset": (lambda h: h.update(dataset=[1]), "its dataset is"),
    "reference": (lambda h: h.update(dataset={"reference_min": "0"}), "its reference_min is '0'"),
    "one reference": (
        lambda h: h.update(dataset={"reference_min": 5.0, "reference_max": 5.0}),
        "its reference_min is 5.0, its reference_max 5.0",
    ),
    "environment": (lambda h: h.update(environment=["os:system"]), "its environment is"),
    "step": (lambda h: h.update(step="last"), "its step is 'last'"),
}
LOAD_AGENTS = """
import json, pathlib, resource, sys
import numpy as np
from minrl import DecisionAgent

sound, *paths = sorted(pathlib.Path().glob("*.safetensors"))
DecisionAgent.load(sound).act(np.zeros((1, 5), np.float32))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in paths:
    try:
        DecisionAgent.load(path).act(np.zeros((1, 5), np.float32))
        message = "acted"
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([message, (peak - before) << 10]), flush=True)
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What loading and acting said of each agent's file, and the memory it took."""
    path = tmp_path_factory.mktemp("agents")
    agent_file(path / "000.safetensors", lambda header: None, **TRANSFORMER)
    for number, (change, _) in enumerate(HEADERS.values(), 1):
        agent_file(path / f"{number:03}.safetensors", change, **TRANSFORMER)
    done = subprocess.run(
        [sys.executable, "-c", LOAD_AGENTS], cwd=path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return dict(zip(HEADERS, rows, strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_of_an_agent_is_refused_at_little_memory(answers, kind):
    message, memory = answers[kind]
    assert message.startswith("CheckpointError: "), message
    assert "does not fit this version of minrl: " in message
    assert re.search(HEADERS[kind][1], message), message
    assert memory <= MOST_MEMORY


def test_a_thousand_steps_of_a_window_are_allowed():
    window = {"backbone": "transformer", "attention_context": 1000, "tokens": "interleaved"}
    model = TrajectoryModel(5, 2, ModelConfig(width=16, num_layers=1, **window))
    agent = DecisionAgent(model, target_return=1.0, context=1000, refresh_every=1)
    assert np.isfinite(agent.act(np.zeros((1, 5), np.float32))).all()


def test_a_window_asked_for_later_is_checked_too():
    small = TrajectoryModel(5, 2, ModelConfig(width=16, num_layers=1))
    agent = DecisionAgent(small, target_return=1.0, context=10**9)  # of training; not acted with
    with pytest.raises(ConfigError, match="a window of 1000000000 steps takes about"):
        agent.refresh_every = 1
    assert agent.refresh_every == 0


@pytest.mark.parametrize("target", [float("nan"), float("inf"), None, "9"])
def test_a_target_that_is_no_finite_number_is_refused(target):
    model = TrajectoryModel(5, 2, ModelConfig(width=16, num_layers=1))
    with pytest.raises(ConfigError, match="target_return must be a finite number"):
        DecisionAgent(model, target_return=target)
    agent = DecisionAgent(model, target_return=1.0)
    if target is not None:
        with pytest.raises(ConfigError, match="target_return must be a finite number"):
            agent.reset(target_return=target)
