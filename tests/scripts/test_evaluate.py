import errno
import re
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from small_runs import make_config

from minrl.agents.checkpoint import CheckpointFolder
from minrl.errors import CheckpointError, ConfigError, EnvError
from minrl.scripts.evaluate import EvaluateConfig, check_environment, evaluate_command, evaluate_run
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train


def test_evaluating_in_another_environment_is_refused(finished):
    for other in ("Walker2d-v5", "Reacher-v5"):
        with pytest.raises(ConfigError, match=r"checkpoint is from Hopper-v5 \(11 observations"):
            evaluate_run(finished, EvaluateConfig(episodes=1, environment=other))
    with pytest.raises(ConfigError, match="the data is from HalfCheetah-v5"):  # of the same sizes
        check_environment("Walker2d-v5", (17, 6), "HalfCheetah-v5", "the data")
    check_environment("HalfCheetah-v4", (17, 6), "HalfCheetah-v5", "the data")


def test_environments_without_a_version_or_a_time_limit(monkeypatch):
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

    for name, limit in (("Alpha", 10), ("Beta", 10), ("Free-v0", None)):
        gymnasium.register(name, HopperEnv, max_episode_steps=limit)
        monkeypatch.delitem(gymnasium.registry, name, raising=False)
        gymnasium.register(name, HopperEnv, max_episode_steps=limit)
    check_environment("Alpha", (11, 3), "Alpha", "the data")
    with pytest.raises(ConfigError, match="the data is from Alpha"):
        check_environment("Beta", (11, 3), "Alpha", "the data")
    with pytest.raises(EnvError, match="'Free-v0' has no limit on the length of an episode"):
        check_environment("Free-v0", (11, 3), None, "the data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "episodes must be at least 1, not 0"),
        ({"checkpoint": "first"}, "checkpoint must be one of both, last, best, not 'first'"),
        ({"refresh_every": -1}, "refresh-every must be at least 0, not -1"),
        ({"device": "gpu0"}, "device 'gpu0' cannot be used"),
    ],
)
def test_impossible_evaluations_are_named(finished, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_run(finished, EvaluateConfig(**{"episodes": 1, **options}))


def test_a_video_that_cannot_be_written_is_refused_before_an_evaluation(finished, monkeypatch):
    evaluations = RunFolder(finished).read_evaluations()
    with pytest.raises(EnvError, match="must end in"):
        evaluate_command(finished, EvaluateConfig(episodes=1), video=Path("episode.avi"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(EnvError, match="imageio-ffmpeg"):
        evaluate_command(finished, EvaluateConfig(episodes=1), video=Path("episode.MP4"))
    assert RunFolder(finished).read_evaluations() == evaluations


def test_a_run_that_may_not_be_written_to_is_evaluated_all_the_same(finished, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(RunFolder, "append_evaluation", refuse)
    with pytest.warns(UserWarning, match="not written down: .*Read-only file system"):
        evaluate_run(
            finished, EvaluateConfig(episodes=1, targets=(900.0, 500.0), checkpoint="last")
        )
    assert capsys.readouterr().out.count("\nlast ") == 2


def test_evaluating_without_a_sound_checkpoint_is_an_error(hopper_id, tmp_path):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, steps=2, eval_episodes=0, final_episodes=0))
    for file in (path / "checkpoints").glob("*.safetensors"):
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="no sound checkpoint"),
    ):
        evaluate_run(path, EvaluateConfig(episodes=1))


def test_evaluation_does_not_depend_on_how_many_environments_step_together(finished):
    results = [
        evaluate_run(
            finished,
            EvaluateConfig(episodes=4, checkpoint="last", targets=(900.0,), num_envs=number),
        )
        for number in (1, 3, None)
    ]
    for (evaluation,) in results[1:]:
        assert evaluation.lengths.tolist() == results[0][0].lengths.tolist()
        np.testing.assert_allclose(evaluation.returns, results[0][0].returns, rtol=1e-4)


def test_best_and_last_are_both_reported_and_named(finished, capsys):
    evaluate_run(finished, EvaluateConfig(episodes=2))
    output = capsys.readouterr().out
    steps = {
        name: re.search(rf"^{name}\s+(\d+)", output, re.M).group(1) for name in ("last", "best")
    }
    folder = CheckpointFolder(finished / "checkpoints")
    assert steps == {"last": str(folder.last()), "best": str(folder.best())}
    assert "D4RL reference scores" in output


def test_by_default_the_final_episodes_are_played_again(hopper_id, tmp_path):
    path = train(make_config(hopper_id, tmp_path / "run", seed=3))
    final = RunFolder(path).read_evaluations()
    evaluate_run(path, EvaluateConfig(episodes=2))
    assert {row["seed"] for row in final} == {20_003}
    assert RunFolder(path).read_evaluations() == final
