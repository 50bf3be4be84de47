import os
import tempfile

import numpy as np
import pytest
import torch

from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.model_config import CONDITIONS, ModelConfig
from minrl.agents.trajectory import TrajectoryModel
from minrl.cli import main
from minrl.data.minari_source import load_dataset
from minrl.scripts import doctor as module
from minrl.scripts.doctor import check_datasets, difference_to_training


@pytest.mark.integration
def test_the_doctor_finds_that_everything_works_and_leaves_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    datasets = os.environ["MINARI_DATASETS_PATH"]
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["versions", "extras", "processor", "gpu", "datasets", "rendering", "mujoco", "round"]
    assert [line.split()[1] for line in lines[:-1]] == names
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[-1].startswith("everything works")
    assert list(tmp_path.iterdir()) == []
    assert os.environ["MINARI_DATASETS_PATH"] == datasets


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that is not there")
def test_a_failed_check_is_named_and_the_others_still_run(capsys, monkeypatch):
    monkeypatch.setattr(module, "check_rendering", lambda: 1 / 0)
    monkeypatch.setattr(module, "SAMPLE_STEPS", 200)
    assert main(["doctor", "--device", "cuda"]) == 1
    *lines, verdict = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == 2
    assert "rendering   ZeroDivisionError at test_doctor.py:" in failed[0]
    assert "device 'cuda' cannot be used" in failed[1]
    assert verdict.startswith("2 of 8 checks failed")


def test_a_datasets_folder_that_cannot_be_made_is_found(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "datasets"))
    status, detail = check_datasets()
    assert status == "FAILED"
    assert f"{tmp_path / 'file'} is no folder" in detail


def test_little_room_for_datasets_is_a_note(monkeypatch):
    monkeypatch.setattr(module, "LEAST_FREE", 2**62)
    status, detail = check_datasets()
    assert status == "note"
    assert detail.endswith("which is little")


@pytest.mark.parametrize("condition", CONDITIONS)
def test_acting_that_differs_from_training_is_measured(hopper_id, condition):
    torch.manual_seed(0)
    model = TrajectoryModel(11, 3, ModelConfig(width=16, num_layers=1, condition=condition))
    agent, episodes = DecisionAgent(model, target_return=3000.0), load_dataset(hopper_id)
    assert difference_to_training(agent, episodes) < 1e-5
    act = agent.act
    agent.act = lambda *inputs: act(*inputs) + np.float32(0.01)
    assert difference_to_training(agent, episodes) == pytest.approx(0.01, rel=0.5)
