import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.registration import EnvSpec
from small_runs import losses_of, make_config, weights_of

from minrl import DecisionAgent, cli
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig
from minrl.errors import ConfigError, DatasetError, EnvError, TrainingError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train

CONSTANT = OptimizationConfig(schedule="constant")


def test_a_run_leaves_what_it_promises(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.json",
        "metrics.jsonl",
        "metrics.csv",
        "evaluations.jsonl",
        "learning_curve.png",
        "target_vs_return.png",
        "checkpoints",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not list(finished.rglob("*.tmp"))
    tags = set().union(*RunFolder(finished).read_metrics())
    for target in RunFolder(finished).read_config().targets:
        for name in ("return_mean", "normalized_score_mean", "normalized_score_std", "length_mean"):
            assert f"eval/{target:g}/{name}" in tags
    assert {"train/loss", "train/grad_norm", "train/lr", "time/steps_per_s"} <= tags
    assert "eval/action_error" in tags
    header = (finished / "metrics.csv").read_text().splitlines()[0].split(",")
    assert set(header) == tags


def test_tensorboard_has_the_same_numbers_as_the_json_lines(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished)).Reload()
    expected = losses_of(finished)
    got = {event.step: event.value for event in events.Scalars("train/loss")}
    assert got == pytest.approx(expected)


def test_the_checkpoint_says_what_it_was_trained_on(finished, hopper_id):
    agent = DecisionAgent.load(finished)
    assert agent.info["step"] == 12
    assert agent.info["dataset"]["dataset_id"] == hopper_id
    assert len(agent.info["dataset"]["sha256"]) == 64
    assert agent.info["environment"] == "Hopper-v5"
    assert agent.references == pytest.approx((-20.272305, 3234.3))
    assert agent.target_return == RunFolder(finished).read_config().targets[0]
    assert agent.info["training"] == RunFolder(finished).read_config().to_json()
    assert {"python", "torch"} <= agent.info["versions"].keys()
    assert np.abs(agent.model.observation_mean.numpy()).max() > 0


class FailingHopper(HopperEnv):
    def step(self, action):
        raise RuntimeError("it fell apart")


def test_an_environment_that_fails_costs_the_evaluation_and_not_the_training(
    hopper_id, tmp_path, monkeypatch
):
    spec = EnvSpec("Hopper-v99", FailingHopper, max_episode_steps=10)
    monkeypatch.setitem(gymnasium.registry, "Hopper-v99", spec)
    options = {"environment": "Hopper-v99", "steps": 4, "final_episodes": 0}
    with pytest.warns(UserWarning, match=r"step 4 has no score: .*'Hopper-v99', episode 0, step 0"):
        train(make_config(hopper_id, tmp_path / "run", **options))
    run = RunFolder(tmp_path / "run")
    assert run.is_finished()
    assert run.checkpoints.header(4)["score"] is None
    assert not run.was_evaluated(run.read_config(), 4)
    assert "eval/action_error" in run.read_metrics()[-1]


def test_a_step_without_episodes_to_play_is_evaluated_all_the_same(hopper_id, tmp_path):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, steps=4, eval_episodes=0, final_episodes=0))
    run = RunFolder(path)
    header = run.checkpoints.header(4)
    assert (header["evaluated"], header["score"]) == (True, None)
    assert run.was_evaluated(run.read_config(), 4)


def test_same_seed_same_run(finished, hopper_id, tmp_path):
    train(make_config(hopper_id, tmp_path / "again"))
    assert losses_of(tmp_path / "again") == losses_of(finished)
    again = weights_of(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in weights_of(finished).items())
    first, second = (
        [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
        for path in (finished, tmp_path / "again")
    )
    assert second == first[: len(second)]  # other tests may have evaluated the first run again


def test_a_failing_evaluation_loses_no_training(hopper_id, tmp_path, monkeypatch):
    from minrl.scripts import recorder

    def fail(*_args, **_kwargs):
        raise EnvError("the simulator is broken")

    path = tmp_path / "run"
    monkeypatch.setattr(recorder, "evaluate", fail)
    with pytest.raises(EnvError, match="the simulator is broken"):
        train(make_config(hopper_id, path))
    assert RunFolder(path).checkpoints.last() == 4


def test_ten_bad_losses_stop_the_run_and_keep_the_weights_before_them(
    hopper_id, tmp_path, monkeypatch
):
    from minrl.agents.device_step import ResidentStep

    plain, steps = ResidentStep.gather, itertools.count()

    def poisoned_batch(self):
        inputs = plain(self)
        if next(steps) >= 6:
            inputs["observations"].fill_(np.nan)
        return inputs

    path = tmp_path / "run"
    options = {"eval_episodes": 0, "final_episodes": 0, "eval_every": 100}
    monkeypatch.setattr(ResidentStep, "gather", poisoned_batch)
    config = make_config(hopper_id, path, steps=100, **options)
    config = dataclasses.replace(config, optimization=CONSTANT)
    with pytest.raises(TrainingError, match="10 times in a row, last at step 16"):
        train(config)
    agent = DecisionAgent.load(path)
    assert agent.info["step"] == 16
    monkeypatch.undo()
    train(dataclasses.replace(config, run_dir=tmp_path / "six", steps=6))
    expected = weights_of(tmp_path / "six")
    assert all(torch.equal(expected[name], value) for name, value in weights_of(path).items())


def test_a_used_run_folder_is_not_touched(finished, hopper_id):
    before = sorted(path.name for path in finished.iterdir())
    with pytest.raises(ConfigError, match=r"exists already.*--resume"):
        train(make_config(hopper_id, finished))
    assert sorted(path.name for path in finished.iterdir()) == before
    with pytest.raises(ConfigError, match=r"run-dir .*config.json is no folder$"):
        train(make_config(hopper_id, finished / "config.json"))


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    hopper_id, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20250101-000000")
    config = make_config(hopper_id, None)
    names = [RunFolder.create(config).path.name for _ in range(3)]
    assert names == [f"mingru-s0-20250101-000000{end}" for end in ("", "-2", "-3")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("runs").touch()
    with pytest.raises(ConfigError, match=r"run-dir runs/.* cannot be made"):
        RunFolder.create(config)


WRONG = {
    "context-too-long": (
        {"context": 5000},
        ConfigError,
        r"context must be from 1 to \d+, the long",
    ),
    "targets": ({"targets": (1.0, float("nan"))}, ConfigError, "targets must be finite"),
    "bad-episode": ({"on_bad_episode": "fix"}, ConfigError, "on-bad-episode must be raise or drop"),
    "twice": (
        {"dataset": ("aa-v0", "bb-v0", "aa-v0")},
        ConfigError,
        "dataset must be different ids",
    ),
    "no-steps": ({"steps": 0}, ConfigError, "steps must be at least 1, not 0"),
    "held-out": ({"held_out": 1.0}, ConfigError, r"held-out must be in \[0, 1\), not 1.0"),
    "backbone": (
        {"model": ModelConfig(backbone="rwkv")},
        ConfigError,
        "backbone must be one of mingru, minlstm, .*, mlp, not 'rwkv'",
    ),
    "dataset": ({"dataset": ("../x",)}, DatasetError, "malformed dataset id '../x'"),
    "near": (
        {"dataset": ("minrl/hoper/medium-v0",)},
        DatasetError,
        "minrl/hopper/medium-v0",
    ),
    "environment": ({"environment": "Hoper-v5"}, EnvError, r"unknown environment.*Hopper-v5"),
    "discrete": ({"environment": "CartPole-v1"}, EnvError, "Discrete.*supports"),
    "sizes": (
        {"environment": "Walker2d-v5"},
        ConfigError,
        r"the data is from Hopper-v5 \(11 observations, 3 actions\), not from Walker2d-v5 \(17",
    ),
    "no-folder": ({"run_dir": Path(__file__) / "run"}, ConfigError, r"cannot be made.*directory"),
    "endless attention": (
        {"model": ModelConfig("transformer", width=16, attention_context=10**8)},
        ConfigError,
        "acting with this attention_context takes about",
    ),
    "device": ({"device": "gpu0"}, ConfigError, "device 'gpu0' cannot be used"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_names_the_field_and_leaves_nothing(case, hopper_id, tmp_path):
    options, error, message = WRONG[case]
    options = dict(options)
    path = tmp_path / "run"
    with pytest.raises(error, match=message):
        train(make_config(**{"dataset": hopper_id, "run_dir": path, **options}))
    assert not path.exists()


@pytest.mark.integration
def test_torchrun_trains_as_one_process_does_and_evaluates_at_the_end(hopper_id, tmp_path):
    arguments = ["train", "--dataset", hopper_id, "--device", "cpu"]
    for flag, value in {
        "width": 16,
        "num-layers": 1,
        "steps": 6,
        "batch-size": 8,
        "log-every": 1,
        "eval-episodes": 0,
        "final-episodes": 2,
    }.items():
        arguments += [f"--{flag}", str(value)]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*arguments, "--run-dir", str(one)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, "-m", "minrl.cli", *arguments, "--run-dir", str(two)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert len(RunFolder(two).read_evaluations()) == len(RunFolder(one).read_evaluations())
    losses, others = losses_of(one), losses_of(two)
    assert losses.keys() == others.keys()
    np.testing.assert_allclose(list(others.values()), list(losses.values()), rtol=1e-5)
    together = weights_of(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(together[name], value, atol=1e-5, rtol=1e-4)
