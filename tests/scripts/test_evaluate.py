import errno
import re
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from small_runs import make_config

from minrl import DecisionAgent, cli
from minrl.agents.checkpoint import CheckpointFolder
from minrl.envs.rollout import evaluate
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
        ({"num_envs": 0}, "num-envs must be at least 1, not 0"),
        ({"num_workers": -1}, "num-workers must be at least 0, not -1"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
        ({"timeout": 0.0}, "timeout must be above 0 seconds, not 0.0"),
        ({"device": "gpu0"}, "device 'gpu0' cannot be used"),
    ],
)
def test_impossible_evaluations_are_named(finished, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_run(finished, EvaluateConfig(**{"episodes": 1, **options}))


def test_a_video_that_cannot_be_written_is_refused_before_an_evaluation(
    finished, tmp_path, monkeypatch
):
    evaluations = RunFolder(finished).read_evaluations()
    with pytest.raises(EnvError, match="must end in"):
        evaluate_command(finished, EvaluateConfig(episodes=1), video=Path("episode.avi"))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(EnvError, match="imageio-ffmpeg"):
        evaluate_command(finished, EvaluateConfig(episodes=1), video=Path("episode.MP4"))
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(EnvError, match="no offscreen OpenGL to render with"):
        evaluate_command(finished, EvaluateConfig(episodes=1), video=tmp_path / "episode.gif")
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


def test_one_episode_has_neither_spread_nor_interval(finished, capsys):
    evaluate_run(finished, EvaluateConfig(episodes=1, checkpoint="last", targets=(1000.0,)))
    row = capsys.readouterr().out.splitlines()[1]
    assert re.fullmatch(r"last +\d+ +1000 +-?\d+(\.\d+)? +- +\d+ +-?\d+\.\d", row)


def test_best_and_last_are_both_reported_and_named(finished, capsys):
    evaluate_run(finished, EvaluateConfig(episodes=2))
    output = capsys.readouterr().out
    steps = {
        name: re.search(rf"^{name}\s+(\d+)", output, re.M).group(1) for name in ("last", "best")
    }
    folder = CheckpointFolder(finished / "checkpoints")
    assert steps == {"last": str(folder.last()), "best": str(folder.best())}
    assert "D4RL reference scores" in output


def test_the_final_episodes_are_not_those_that_chose_the_best_and_are_played_again_by_default(
    hopper_id, tmp_path, monkeypatch
):
    from minrl.scripts import recorder

    choosing, plain = set(), recorder.evaluate

    def note_seed(*arguments, seed, **options):
        choosing.add(seed)
        return plain(*arguments, seed=seed, **options)

    monkeypatch.setattr(recorder, "evaluate", note_seed)
    path = train(make_config(hopper_id, tmp_path / "run", seed=3))
    final = RunFolder(path).read_evaluations()
    evaluate_run(path, EvaluateConfig(episodes=2))
    assert {row["seed"] for row in final} == {20_003}
    assert choosing == {10_003}
    assert RunFolder(path).read_evaluations() == final


@pytest.mark.parametrize(
    ("flags", "refresh_every", "seed"),
    [((), 0, 20_000), (("--refresh-every", "1"), 1, 20_000), (("--seed", "7"), 0, 7)],
    ids=["plain", "refresh-every", "seed"],
)
def test_flags_of_the_command_decide_how_episodes_are_played(
    finished, flags, refresh_every, seed, monkeypatch
):
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # main replaces it
    arguments = ["--checkpoint", "last", "--episodes", "3", "--targets", "1500", *flags]
    assert cli.main(["evaluate", str(finished), *arguments]) == 0
    agent = DecisionAgent.load(finished)
    agent.refresh_every = refresh_every
    expected = evaluate(agent, "Hopper-v5", episodes=3, target_return=1500.0, seed=seed)
    (row,) = (
        row
        for row in RunFolder(finished).read_evaluations()
        if (row["target_return"], row["refresh_every"], row["seed"]) == (1500, refresh_every, seed)
    )
    assert row["returns"] == expected.returns.tolist()


def test_the_video_is_of_the_first_target_and_the_seed_of_the_evaluation(
    finished, tmp_path, monkeypatch
):
    from minrl.scripts import evaluate as module

    filmed = []

    def note(agent, *arguments, **options):
        filmed.append((agent.info["step"], *arguments, options))

    monkeypatch.setattr(module, "record_video", note)
    config = EvaluateConfig(episodes=1, checkpoint="last", targets=(700.0, 5.0), seed=4)
    path = tmp_path / "episode.gif"
    evaluate_command(finished, config, video=path)
    assert filmed == [(12, "Hopper-v5", path, {"target_return": 700.0, "seed": 4})]
