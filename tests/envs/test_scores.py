"""Normalised scores against D4RL's published constants and formula."""

import numpy as np
import pytest

from minrl.envs.scores import REFERENCE_SCORES, normalized_score, reference_scores
from minrl.errors import EnvError


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("Hopper-v5", "hopper"),
        ("HalfCheetah-v4", "halfcheetah"),
        ("Walker2d-v2", "walker2d"),
        ("minrl/hopper/medium-expert-v0", "hopper"),
        ("mujoco/walker2d/expert-v0", "walker2d"),
        ("d4rl/halfcheetah/medium-replay-v2", "halfcheetah"),
        ("hopper-medium-v2", "hopper"),
    ],
)
def test_environment_and_dataset_ids_find_their_task(name, task):
    assert reference_scores(name) == REFERENCE_SCORES[task]


@pytest.mark.parametrize(
    "name",
    [
        "Pendulum-v1",
        "HopperBulletEnv-v0",
        "mujoco/ant/medium-v0",
        "dm_control/hopper-hop-v0",
        "mo-hopper-v5",
        "Hopper-sparse-v0",
        "Walker2d-Hard-v0",
        "Hopper/backflip-v1",
        "",
    ],
)
def test_unknown_task_is_an_error_that_names_it_and_the_known_ones(name):
    with pytest.raises(EnvError, match=f"{name!r}.*halfcheetah, hopper, walker2d"):
        normalized_score(1.0, name)


def test_arguments_the_wrong_way_round_are_an_error_that_says_so():
    with pytest.raises(EnvError, match=r"known by a name such as 'Hopper-v5', not 3400\.0"):
        normalized_score("Hopper-v5", 3400.0)


def test_the_references_are_those_that_d4rl_published():
    assert REFERENCE_SCORES == {
        "halfcheetah": (-280.178953, 12135.0),
        "hopper": (-20.272305, 3234.3),
        "walker2d": (1.629008, 4592.3),
    }


def test_random_is_0_and_expert_is_100():
    for task, (lowest, highest) in REFERENCE_SCORES.items():
        np.testing.assert_allclose(normalized_score(np.array([lowest, highest]), task), [0, 100])


def test_scores_agree_with_published_d4rl_pairs():
    # Hopper expert data: 3,511 average return is known as about 109; medium 1,422 as about 44.3.
    assert normalized_score(3511.0, "Hopper-v5") == pytest.approx(108.5, abs=0.1)
    assert normalized_score(1422.0, "Hopper-v5") == pytest.approx(44.3, abs=0.1)
