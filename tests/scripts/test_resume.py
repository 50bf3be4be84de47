import dataclasses
import json
import signal
import warnings

import pytest
import torch
from small_runs import SMALL, losses_of, make_config, weights_of

from minrl import cli
from minrl.errors import ConfigError, DatasetError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train


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
            signal.raise_signal(signal.SIGINT)
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
            signal.raise_signal(signal.SIGINT)
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


def test_a_longer_resumed_run_is_still_longer_the_next_time(hopper_id, tmp_path):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, steps=4, eval_episodes=0, final_episodes=0))
    run = RunFolder(path)
    assert run.is_finished()
    with pytest.warns(UserWarning, match="one of 6 steps from the start, not of 4: .* rises again"):
        train(dataclasses.replace(run.read_config(), steps=6), resume=path)
    assert run.read_config().steps == 6
    assert run.checkpoints.last() == 6
    assert run.is_finished()


@pytest.mark.filterwarnings("ignore:the learning rate goes on as if")
def test_a_run_is_not_resumed_to_an_earlier_step(finished):
    run = RunFolder(finished)
    with pytest.raises(ConfigError, match="is at step 12 already: steps must be at least that"):
        train(dataclasses.replace(run.read_config(), steps=8), resume=finished)
    assert run.read_config().steps == 12


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


@pytest.mark.filterwarnings("ignore:the learning rate goes on as if")
def test_resume_refuses_other_data_and_other_settings(hopper_id, tmp_path, monkeypatch):
    path = tmp_path / "run"
    train(make_config(hopper_id, path, final_episodes=0))
    config = RunFolder(path).read_config()
    with pytest.raises(ConfigError, match=r"run-dir is .* in this run and cannot be"):
        config.continued_with(dataclasses.replace(config, run_dir=tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="width is 16 in this run and cannot be 8"):
        config.continued_with(
            dataclasses.replace(config, model=dataclasses.replace(SMALL, width=8))
        )
    assert config.continued_with(dataclasses.replace(config, steps=20)).steps == 20
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match="seed is 0 in this run and cannot be 7"):
        train(dataclasses.replace(config, steps=20, seed=7), resume=path)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    from minrl.data.behaviours import make_embedded_dataset

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "other"))
    make_embedded_dataset(hopper_id, steps=2_000, seed=1, progress=False)
    with pytest.raises(DatasetError, match="is not the data this run was trained on"):
        train(dataclasses.replace(config, steps=20), resume=path)


@pytest.mark.filterwarnings("ignore:the learning rate goes on as if")
def test_what_the_data_decided_need_not_be_repeated(hopper_id, tmp_path):
    begun = make_config(hopper_id, None, final_episodes=0, match_parameters=5_000)
    path = train(dataclasses.replace(begun, run_dir=tmp_path / "run"))
    complete = RunFolder(path).read_config()
    assert complete.targets
    assert complete.model.width != begun.model.width
    train(dataclasses.replace(begun, steps=16), resume=path)
    assert RunFolder(path).read_config() == dataclasses.replace(complete, steps=16)


def test_the_command_refuses_to_resume_with_other_settings(finished, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # main replaces it
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.rglob("*"))
    assert cli.main(["train", "--resume", str(finished), "--batch-size", "4"]) == 2
    assert "batch-size is 8 in this run and cannot be 4" in capsys.readouterr().err
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.rglob("*")) == before


def test_resume_of_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"is not a run: it has no config\.json"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ConfigError, match="cannot read"):
        RunFolder(tmp_path).read_config()
    (tmp_path / "config.json").write_text('{"colour": "blue"}')
    with pytest.raises(ConfigError, match="not of this version"):
        RunFolder(tmp_path).read_config()
