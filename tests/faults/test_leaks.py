"""Whatever is done again and again takes no more of the machine than the first time."""

import dataclasses
import gc
import os
import threading
from pathlib import Path

import gymnasium
import pytest
from children import ask
from faulty_environment import Faulty, Steady

from minrl import DecisionAgent, evaluate, load_dataset
from minrl.agents.model_config import ModelConfig
from minrl.errors import EvaluationError
from minrl.scripts.train import train
from minrl.scripts.train_config import TrainConfig

CYCLES = [1, pytest.param(100, marks=pytest.mark.slow)]
WARM_UP = 1
GROWTH_ALLOWED = 16  # MiB, of all cycles together; a leaked dataset or model would show by itself


def open_files():
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(link) for link in links if os.path.lexists(link))


def child_processes():
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


def resident_mebibytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def resources():
    gc.collect()
    return {
        "files": open_files(),
        "processes": child_processes(),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": sorted(thread.name for thread in threading.enumerate()),
    }


def live_once(config, path):
    """Load, train, save, evaluate here and in a worker, also where one dies, act."""
    train(dataclasses.replace(config, run_dir=path))
    agent = DecisionAgent.load(path)
    for workers in (0, 1):
        plan = {"episodes": 2, "target_return": -300.0, "num_workers": workers}
        evaluate(agent, config.environment, max_episode_steps=5, **plan)
    kwargs = {"fault": "SIGKILL", "helper": True}
    gymnasium.register("Faulty-v0", entry_point=Faulty, max_episode_steps=9, kwargs=kwargs)
    with pytest.raises(EvaluationError, match="was killed by SIGKILL"):
        evaluate(Steady(), "Faulty-v0", episodes=2, num_workers=1)
    gymnasium.registry.pop("Faulty-v0")
    agent.reset()
    agent.act(load_dataset(config.dataset).observations[0])


def live_often(config, path, cycles):
    """Return what was held before and after so many cycles, and how far the memory grew."""
    for number in range(WARM_UP):
        live_once(config, path / f"warm-up-{number}")
    before, memory = resources(), resident_mebibytes()
    for number in range(cycles):
        live_once(config, path / str(number))
        gc.collect()  # what only waits to be collected is no leak, but widens the process
    return before, resources(), resident_mebibytes() - memory


@pytest.mark.parametrize("cycles", CYCLES)
def test_nothing_leaks_from_one_cycle_to_the_next(pendulum_id, tmp_path, cycles):
    """In a process of its own: what pytest keeps of output and of other tests is not ours."""
    config = TrainConfig(
        dataset=(pendulum_id,),
        environment="Pendulum-v1",
        model=ModelConfig(width=16, num_layers=1),
        batch_size=8,
        context=10,
        targets=(-300.0,),
        steps=2,
        eval_every=1,
        eval_episodes=1,
        final_episodes=0,
        device="cpu",
    )
    before, after, growth = ask(live_often, config, tmp_path, cycles)
    assert after == before
    assert growth < GROWTH_ALLOWED
