"""Environments in processes of their own: the same numbers, and what cannot run there refused."""

import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from faulty_environment import Faulty, Steady

from minrl.envs.rollout import evaluate
from minrl.errors import ConfigError, EnvError, EvaluationError

slow = pytest.mark.slow
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


def run(name, num_workers=1, **options):
    return evaluate(
        Steady(),
        name,
        num_workers=num_workers,
        episodes=12,
        num_envs=3,
        **{"timeout": 60.0, **options},
    )


@pytest.mark.parametrize("num_workers", [2, *(pytest.param(n, marks=slow) for n in (1, 3, 8))])
def test_workers_change_no_number(faulty, num_workers):
    name, heard = faulty(), {}
    alone = run(name, 0, seed=3, target_return=5.0)
    result = run(
        name,
        num_workers,
        seed=3,
        target_return=5.0,
        on_episode=lambda *report: heard.setdefault(report[0], report[1:]),
    )
    assert np.array_equal(result.returns, alone.returns)
    assert np.array_equal(result.lengths, alone.lengths)
    assert (result.returns.dtype, result.lengths.dtype) == (np.float64, np.int64)
    assert heard == dict(enumerate(zip(alone.returns, alone.lengths, strict=True)))
    assert len(set(alone.lengths.tolist())) > 3


def test_workers_truncate_episodes_where_they_are_told(faulty):
    name = faulty()
    alone = run(name, 0, max_episode_steps=4)
    result = run(name, 1, max_episode_steps=4)
    assert result.lengths.max() == 4
    assert np.array_equal(result.returns, alone.returns)


def test_workers_load_neither_torch_nor_the_program_that_started_them(faulty):
    assert "torch" in sys.modules
    with pytest.raises(EvaluationError, match=r"OSError\(set\(\)\)"):
        run(faulty(fault="look around", episode=0))


def test_what_an_environment_is_registered_with_arrives_as_it_is(faulty):
    told = {"goal": (0, 1), "ranges": [(0.7, float("inf")), []], 3: {(1, 2): None}, "flag": True}
    with pytest.raises(EvaluationError) as caught:
        run(faulty(told=told))
    assert repr(OSError(repr(told))) in str(caught.value)


def test_environments_that_workers_cannot_make_are_refused(faulty, new_children):
    class Local(Faulty):
        pass

    for maker, kwargs, message in (
        (Local, {}, "worker processes cannot import what makes 'Faulty-v0'.*num_workers=0"),
        (lambda: Faulty(), {}, "worker processes cannot import"),
        (Faulty, {"mark": Path("x")}, "registered with cannot be handed to.*of type PosixPath"),
        (Faulty, {"told": [np.float64(1)]}, "cannot be handed to.*of type float64"),
        (Faulty, {"told": {"set": {1}}}, "cannot be handed to.*of type set"),
    ):
        gymnasium.register("Faulty-v0", entry_point=maker, max_episode_steps=100, kwargs=kwargs)
        with pytest.raises(EnvError, match=message):
            run("Faulty-v0", 1)
        gymnasium.registry.pop("Faulty-v0")
    with pytest.raises(EnvError, match="names a module to import"):
        run("faulty_environment:Faulty-v0", 1)
    assert not new_children()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers must be at least 0, not -1"),
        ({"timeout": 0}, "timeout must be above 0 s, or None for ever, not 0"),
        ({"timeout": float("nan")}, "timeout must be above 0 s, or None for ever, not nan"),
        ({"timeout": float("inf")}, "timeout must be above 0 s, or None for ever, not inf"),
    ],
)
def test_impossible_numbers_of_workers_and_seconds_are_named(faulty, options, message):
    with pytest.raises(ConfigError, match=message):
        run(faulty(), **options)
