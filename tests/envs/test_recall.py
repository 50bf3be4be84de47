import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from minrl.envs.recall import RECALL_ID, Recall


def play(environment, answer, seed=None):
    """The observations of one episode and its rewards; `answer` sees all observations so far."""
    observation, _ = environment.reset(seed=seed)
    observations, rewards = [observation], []
    terminated = truncated = False
    while not (terminated or truncated):
        observation, reward, terminated, truncated, _ = environment.step(answer(observations))
        observations.append(observation)
        rewards.append(reward)
    assert terminated
    assert not truncated
    return np.stack(observations[:-1]), np.array(rewards)


@pytest.mark.parametrize(("length", "cues"), [(0, 2), (1, 4), (50, 4), (300, 9)])
def test_gymnasium_s_own_checker_finds_nothing(length, cues):
    environment = gym.make(RECALL_ID, length=length, cues=cues)
    check_env(environment.unwrapped, skip_render_check=True)


@pytest.mark.parametrize("length", [0, 1, 7, 250])
def test_an_episode_is_cue_then_blanks_then_question(length):
    environment = gym.make(RECALL_ID, length=length, cues=3)
    observations, rewards = play(environment, lambda seen: 0, seed=1)
    assert observations.shape == (length + 2, 4)
    assert len(rewards) == length + 2
    assert sorted(observations[0]) == [0, 0, 0, 1]
    assert observations[0, -1] == 0
    assert not observations[1:-1].any()
    np.testing.assert_array_equal(observations[-1], [0, 0, 0, 1])
    assert not rewards[:-1].any()


def test_the_cue_is_worth_one_and_the_last_observation_alone_is_worth_chance():
    environment = gym.make(RECALL_ID, length=5, cues=4)
    environment.reset(seed=0)
    remembering = [play(environment, lambda seen: seen[0].argmax())[1].sum() for _ in range(200)]
    assert set(remembering) == {1.0}
    # 4000 draws at 1/4: a standard error of 0.007.
    forgetting = [play(environment, lambda seen: 2)[1].sum() for _ in range(4000)]
    assert np.mean(forgetting) == pytest.approx(0.25, abs=0.03)


def test_only_the_answer_at_the_question_counts():
    environment = Recall(length=3, cues=4)

    def right_too_early(seen):
        right = seen[0].argmax()
        return right if not seen[-1][-1] else (right + 1) % 4

    assert play(environment, right_too_early, seed=3)[1].sum() == 0


def test_the_seed_decides_the_cues_and_every_cue_comes():
    def cues_of(seed):
        environment = Recall(length=0, cues=4)
        environment.reset(seed=seed)
        return [int(environment.reset()[0].argmax()) for _ in range(60)]

    assert cues_of(5) == cues_of(5)
    assert cues_of(5) != cues_of(6)
    assert set(cues_of(5)) == {0, 1, 2, 3}


def test_many_environments_step_side_by_side():
    environments = gym.make_vec(RECALL_ID, num_envs=3, vectorization_mode="sync", length=2, cues=5)
    observations, _ = environments.reset(seed=0)
    answers = observations.argmax(1)
    for _ in range(4):
        observations, rewards, terminated, _, _ = environments.step(answers)
    assert terminated.all()
    np.testing.assert_array_equal(rewards, np.ones(3))


@pytest.mark.parametrize("arguments", [{"length": -1}, {"cues": 1}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="cues >= 2"):
        Recall(**arguments)
