import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.mujoco.hopper_v5 import HopperEnv
from gymnasium.envs.registration import EnvSpec
from small_runs import SMALL, make_config

from minrl import DecisionAgent
from minrl.agents.checkpoint import CheckpointFolder, load_weights
from minrl.agents.training import OptimizationConfig
from minrl.agents.trajectory import ModelConfig
from minrl.data.minari_source import load_dataset
from minrl.errors import ConfigError, DatasetError, EnvError, TrainingError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import choose_targets, train

CONSTANT = OptimizationConfig(schedule="constant")


def weights_of(path):
    folder = CheckpointFolder(path / "checkpoints")
    return load_weights(folder.weights(folder.last()))[0]


def losses_of(path):
    rows = RunFolder(path).read_metrics()
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


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


def test_asked_for_is_what_the_best_tenth_and_all_of_the_data_came_to(hopper_id):
    episodes = load_dataset(hopper_id)
    ranked = sorted(zip(episodes.returns, episodes.lengths, strict=True), reverse=True)
    best, steps = [], 0
    for value, length in ranked:
        steps += length
        if steps > episodes.num_steps / 10 and best:
            break
        best += [value] * length
    everything = [value for value, length in ranked for _ in range(length)]
    asked = choose_targets(episodes)
    assert asked == pytest.approx((np.mean(best), np.mean(everything)), rel=5e-3)
    assert asked[0] > asked[1]
    alone = choose_targets(episodes.select([0]))
    assert alone == pytest.approx((episodes.returns[0],), rel=5e-3)


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


@pytest.mark.parametrize(
    "cut", [7, *(pytest.param(cut, marks=pytest.mark.integration) for cut in (4, 11))]
)
def test_resume_after_a_signal_continues_bit_for_bit(
    finished, hopper_id, tmp_path, cut, monkeypatch
):
    from minrl.agents.training import Trainer

    plain_step = Trainer.step_from

    def step_and_interrupt(self, sampler):
        report = plain_step(self, sampler)
        if self.step_count == cut:
            os.kill(os.getpid(), signal.SIGINT)
        return report

    path = tmp_path / "run"
    config = make_config(hopper_id, path)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_from", step_and_interrupt)
        train(config)
    run = RunFolder(path)
    assert run.checkpoints.last() == cut
    train(run.read_config(), resume=path)
    assert losses_of(path) == losses_of(finished)
    resumed = weights_of(path)
    assert all(torch.equal(resumed[name], value) for name, value in weights_of(finished).items())


def test_a_signal_during_an_evaluation_loses_no_score(finished, hopper_id, tmp_path, monkeypatch):
    from minrl.scripts import recorder

    plain, calls = recorder.evaluate, []

    def evaluate_and_interrupt(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*args, **kwargs)

    path = tmp_path / "run"
    monkeypatch.setattr(recorder, "evaluate", evaluate_and_interrupt)
    train(make_config(hopper_id, path))
    scores = [
        json.loads((folder / "checkpoints" / "step-00000004.json").read_text())["score"]
        for folder in (path, finished)
    ]
    assert scores[0] == scores[1]
    assert scores[0] is not None


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


def test_a_longer_resumed_run_is_still_longer_the_next_time(hopper_id, tmp_path):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, steps=4, eval_episodes=0, final_episodes=0))
    run = RunFolder(path)
    assert run.is_finished()
    train(dataclasses.replace(run.read_config(), steps=6), resume=path)
    assert run.read_config().steps == 6
    assert run.checkpoints.last() == 6
    assert run.is_finished()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(finished, hopper_id, tmp_path):
    path = tmp_path / "run"
    train(make_config(hopper_id, path))
    for file in (path / "checkpoints").iterdir():
        file.unlink()
    train(RunFolder(path).read_config(), resume=path)
    assert losses_of(path) == losses_of(finished)


def test_resume_falls_back_when_the_last_checkpoint_is_damaged(finished, hopper_id, tmp_path):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, final_episodes=0))
    damaged = path / "checkpoints" / "step-00000012.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run = RunFolder(path)
    with pytest.warns(UserWarning, match=r"step-00000012\.safetensors is damaged"):
        train(run.read_config(), resume=path)
    resumed = weights_of(path)
    assert all(torch.equal(resumed[name], value) for name, value in weights_of(finished).items())


def test_resume_refuses_other_data_and_other_settings(hopper_id, tmp_path, monkeypatch):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, final_episodes=0))
    config = RunFolder(path).read_config()
    with pytest.raises(ConfigError, match=r"--run-dir is .* in this run and cannot be"):
        config.continued_with(dataclasses.replace(config, run_dir=tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="--width is 16 in this run and cannot be 8"):
        config.continued_with(
            dataclasses.replace(config, model=dataclasses.replace(SMALL, width=8))
        )
    assert config.continued_with(dataclasses.replace(config, steps=20)).steps == 20
    from minrl.data.behaviours import make_embedded_dataset

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "other"))
    make_embedded_dataset(hopper_id, steps=2_000, seed=1, progress=False)
    with pytest.raises(DatasetError, match="is not the data this run was trained on"):
        train(dataclasses.replace(config, steps=20), resume=path)


def test_resume_of_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no config\.json"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ConfigError, match="cannot read"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text('{"colour": "blue"}')
    with pytest.raises(ConfigError, match="not of this version"):
        RunFolder(tmp_path).read_config()


def test_a_used_run_folder_is_not_touched(finished, hopper_id):
    before = sorted(path.name for path in finished.iterdir())
    with pytest.raises(ConfigError, match=r"exists already.*--resume"):
        train(make_config(hopper_id, finished))
    assert sorted(path.name for path in finished.iterdir()) == before


WRONG = {
    "context-too-long": (
        {"context": 5000},
        ConfigError,
        r"context must be from 1 to \d+, the long",
    ),
    "targets": ({"targets": (1.0, float("nan"))}, ConfigError, "targets must be finite"),
    "bad-episode": ({"on_bad_episode": "fix"}, ConfigError, "on-bad-episode must be raise or drop"),
    "no-steps": ({"steps": 0}, ConfigError, "steps must be at least 1, not 0"),
    "held-out": ({"held_out": 1.0}, ConfigError, "held-out must be between 0 and 1, not 1.0"),
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
def test_torchrun_gives_the_loss_curve_of_one_process(hopper_id, tmp_path):
    model = dataclasses.replace(SMALL, dropout=0.0)
    options = {"model": model, "eval_episodes": 0, "final_episodes": 0, "log_every": 1, "steps": 6}
    train(make_config(hopper_id, tmp_path / "one", **options))
    config = make_config(hopper_id, tmp_path / "two", **options)
    (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
    program = tmp_path / "program.py"
    program.write_text(
        "import json, sys\n"
        "from minrl.scripts.train import train\n"
        "from minrl.scripts.train_config import TrainConfig\n"
        "train(TrainConfig.from_json(json.load(open(sys.argv[1]))))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(program), str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    one, two = losses_of(tmp_path / "one"), losses_of(tmp_path / "two")
    assert one.keys() == two.keys()
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-5)
    together = weights_of(tmp_path / "two")
    for name, value in weights_of(tmp_path / "one").items():
        torch.testing.assert_close(together[name], value, atol=1e-5, rtol=1e-4)
