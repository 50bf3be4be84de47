import re

import numpy as np
import pytest

from minrl.data.validate import ActionBounds, find_violation, settle_violations
from minrl.errors import DatasetError

NAN, INF = np.nan, np.inf
BOUNDS = ActionBounds(np.array([-1.0, -INF]), np.array([1.0, INF]))


def sound_episode():
    return {
        "observations": np.arange(12.0).reshape(4, 3),
        "actions": np.zeros((3, 2), np.float32),
        "rewards": np.ones(3),
        "terminations": np.array([False, False, True]),
        "truncations": np.zeros(3, bool),
    }


def put(name, index, value):
    def change(episode):
        episode[name][index] = value

    return change


def replace(**arrays):
    def change(episode):
        episode.update({name: np.asarray(array) for name, array in arrays.items()})

    return change


def remove(name):
    def change(episode):
        del episode[name]

    return change


def check(change, is_last=False):
    episode = sound_episode()
    change(episode)
    return find_violation(episode, 7, observation_size=3, bounds=BOUNDS, is_last=is_last)


BAD = {
    "nan observation": (put("observations", (1, 2), NAN), "finite", 1),
    "nan last observation": (put("observations", (3, 0), NAN), "finite", 3),
    "infinite observation": (put("observations", (0, 0), -INF), "finite", 0),
    "observation beyond float32": (put("observations", (2, 0), 1e39), "finite", 2),
    "nan action": (put("actions", (1, 0), NAN), "finite", 1),
    "infinite unbounded action": (put("actions", (2, 1), INF), "finite", 2),
    "nan reward": (put("rewards", 2, NAN), "finite", 2),
    "infinite reward": (put("rewards", 0, INF), "finite", 0),
    "infinite half-precision observation": (
        replace(observations=np.full((4, 3), INF, np.float16)),
        "finite",
        0,
    ),
    "rewards whose sum is beyond float32": (put("rewards", slice(0, 2), 3e38), "finite", 0),
    "reward beyond float32": (put("rewards", 0, 1e300), "finite", 0),
    "action above its bound": (put("actions", (2, 0), 1e9), "bounds", 2),
    "action below its bound": (put("actions", (0, 0), -1.1), "bounds", 0),
    "unbounded action beyond 1e30": (put("actions", (1, 1), -2e30), "bounds", 1),
    "last observation missing": (
        replace(observations=np.zeros((3, 3))),
        "lengths",
        None,
    ),
    "one observation too many": (replace(observations=np.zeros((5, 3))), "lengths", None),
    "fewer actions than rewards": (replace(actions=np.zeros((2, 2))), "lengths", None),
    "fewer flags than rewards": (replace(terminations=[True]), "lengths", None),
    "no steps": (
        replace(
            observations=np.zeros((1, 3)),
            actions=np.zeros((0, 2)),
            rewards=np.zeros(0),
            terminations=np.zeros(0),
            truncations=np.zeros(0),
        ),
        "empty",
        None,
    ),
    "scalar rewards": (replace(rewards=1.0), "empty", None),
    "discrete actions": (replace(actions=[0, 1, 0]), "shape", None),
    "image observations": (replace(observations=np.zeros((4, 8, 8))), "shape", None),
    "other observation size": (replace(observations=np.zeros((4, 2))), "shape", None),
    "rewards in a column": (replace(rewards=np.ones((3, 1))), "shape", None),
    "text actions": (replace(actions=[["a", "b"]] * 3), "dtype", None),
    "complex rewards": (replace(rewards=[1j, 0, 0]), "dtype", None),
    "object observations": (replace(observations=np.full((4, 3), None)), "dtype", None),
    "no rewards": (remove("rewards"), "arrays", None),
    "dict observations": (
        lambda episode: episode.update(observations={"position": np.zeros((4, 3))}),
        "arrays",
        None,
    ),
    "termination in the middle": (put("terminations", 1, True), "flags", 1),
    "truncation at the start": (put("truncations", 0, True), "flags", 0),
    "no end, more episodes follow": (put("terminations", 2, False), "end", 2),
}

SOUND = {
    "as it is": lambda episode: None,
    "both ends at the last step": put("truncations", 2, True),
    "constant feature": put("observations", (slice(None), 1), 5.0),
    "cut off by a time limit": replace(terminations=[0, 0, 0], truncations=[0, 0, 1]),
    "largest reward": put("rewards", 1, np.finfo(np.float32).max),
    "action at its bound": put("actions", (1, 0), 1.0),
    "action a rounding beyond its bound": put("actions", (1, 0), 1.0000001),
    "huge unbounded action": put("actions", (1, 1), 1e30),
    "whole numbers": replace(observations=np.zeros((4, 3), int), terminations=[0, 0, 1]),
}


@pytest.mark.parametrize(("change", "rule", "step"), BAD.values(), ids=BAD)
def test_bad_episode_is_named_by_rule_episode_and_step(change, rule, step):
    violation = check(change)
    assert (violation.rule, violation.episode, violation.step) == (rule, 7, step)
    place = "episode 7" if step is None else f"episode 7, step {step}"
    assert str(violation).startswith(f"rule {rule}, {place}: ")


@pytest.mark.parametrize("change", SOUND.values(), ids=SOUND)
def test_unusual_but_sound_episode_passes(change):
    assert check(change) is None


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    ("bound", "inside", "outside"), [(1000, 1000.0009, 1000.0011), (0.5, 0.5000009, 0.5000011)]
)
def test_the_tolerance_is_a_millionth_of_a_bound_and_of_one_at_least(bound, inside, outside, sign):
    bounds = ActionBounds(np.array([-bound, -INF]), np.array([bound, INF]))
    episode = sound_episode()
    for value, rule in ((inside, None), (outside, "bounds")):
        episode["actions"] = np.full((3, 2), sign * value)
        found = find_violation(episode, 0, observation_size=3, bounds=bounds, is_last=False)
        assert (found.rule if found else None) == rule


def test_unfinished_episode_passes_as_the_last_one_only():
    assert check(put("terminations", 2, False), is_last=True) is None
    assert check(put("terminations", 2, False), is_last=False).rule == "end"


def test_the_value_is_in_the_message():
    violation = check(put("actions", (2, 0), 1.5))
    assert str(violation) == "rule bounds, episode 7, step 2: actions [0] = 1.5, outside [-1, 1]"
    assert "observations [2] = nan" in str(check(put("observations", (1, 2), NAN)))
    assert "rewards = inf" in str(check(put("rewards", 0, INF)))


def test_bad_episodes_are_refused_or_dropped_with_counts():
    violations = [check(put("rewards", 0, NAN)), check(put("rewards", 1, NAN))]
    violations.append(check(put("terminations", 0, True)))
    settle_violations("a-v0", [], 9, "raise")
    with pytest.raises(DatasetError, match=r"a-v0: rule finite, episode 7, step 0.*3 of 9"):
        settle_violations("a-v0", violations, 9, "raise")
    with pytest.warns(UserWarning, match=re.escape("bad and dropped (finite 2, flags 1)")):
        settle_violations("a-v0", violations, 9, "drop")
    with pytest.raises(DatasetError, match="all 3 episodes are bad"):
        settle_violations("a-v0", violations, 3, "drop")
