"""Agents that act for a very long time without a reset neither grow nor slow down."""

import gc
import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.model_config import ModelConfig

pytestmark = pytest.mark.integration

FULL, SMALL = 1_000_000, 5_000  # steps of environments
# Of each kind: model, agent, and environments at a time, since its step in PyTorch costs the same.
KINDS = {
    "recurrent": ({"tokens": "interleaved"}, {}, 1),
    "windowed": ({}, {"refresh_every": 1, "context": 20}, 10),
    "refreshed": ({}, {"refresh_every": 7, "context": 20}, 10),
    "attention": ({"backbone": "transformer", "attention_context": 20}, {}, 10),
}


def make_agent(kind):
    torch.manual_seed(0)
    model, options, _ = KINDS[kind]
    told = {"condition": "return-to-go", "max_timestep": 1000}
    config = ModelConfig(width=16, num_layers=1, **told, **model)
    return DecisionAgent(TrajectoryModel(5, 2, config), target_return=1e4, **options)


def memory_in_use():
    """Bytes that the process has in memory, and the number of Python's objects there."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return np.array([pages * resource.getpagesize(), sys.getallocatedblocks()])


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
@pytest.mark.parametrize("steps", [SMALL, pytest.param(FULL, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_run_grows_neither_in_memory_nor_in_time(kind, steps):
    """In the last tenth of its steps the agent takes turns with another in its first ones.

    So whatever else the machine does slows both. Time is that of the processor, in which waiting
    for a turn does not count.
    """
    rows = KINDS[kind][2]
    calls = steps // rows
    warm_up, turns = max(calls // 10, 100), max(calls // 10, 100)
    agent, young = make_agent(kind), make_agent(kind)
    generator = np.random.default_rng(0)
    observations = generator.normal(size=(997, rows, 5)).astype(np.float32)
    rewards = generator.normal(size=(991, rows))
    times = np.ones((turns, 2), dtype=np.int64)  # ns; written to, so that they are in memory

    def act(actor, call):
        start = time.thread_time_ns()
        actions = actor.act(observations[call % 997], rewards[call % 991])
        taken = time.thread_time_ns() - start
        assert np.isfinite(actions).all()
        return taken

    for call in range(warm_up):  # all is compiled, windows are full
        act(agent, call)
        if call < 100:
            act(young, call)
    young.reset()
    before = memory_in_use()
    for call in range(warm_up, calls - turns):
        act(agent, call)
    for turn in range(turns):
        for column in (0, 1) if turn % 2 else (1, 0):
            times[turn, column] = act((agent, young)[column], turn)
    grown, objects = memory_in_use() - before

    # Of few steps the slowest are a matter of chance: there the median has to do.
    old, new = np.quantile(times, 0.99 if steps == FULL else 0.5, axis=0)
    print(f"{kind}, {steps} steps: {grown} bytes and {objects} objects more;", end=" ")
    print(f"{old:.0f} ns a step against {new:.0f}: {old / new:.3f}")  # for pytest -rP
    assert grown < 2**20
    assert objects < 300  # fewer than one a call, even of the small run
    assert old <= 1.1 * new
