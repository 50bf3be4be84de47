"""What a CUDA device must give: the CPU's numbers, to rounding. Run with: pytest -m gpu."""

import numpy as np
import pytest
import torch

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import ModelConfig
from minrl.data.windows import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make_batch(step):
    generator = np.random.default_rng(step)
    mask = np.arange(20) < generator.integers(1, 21, size=64)[:, None]
    return Batch(
        observations=generator.normal(size=(64, 20, 11)).astype(np.float32),
        actions=np.tanh(generator.normal(size=(64, 20, 3))).astype(np.float32),
        returns_to_go=generator.normal(size=(64, 20)).astype(np.float32),
        timesteps=np.tile(np.arange(20), (64, 1)),
        mask=mask,
        loss_mask=mask,
    )


@pytest.mark.parametrize("length", [1, 60, 1000])
def test_scan_on_cuda_equals_the_float64_loop(length):
    update, candidate = torch.randn(2, 4, length, 33)
    expected, _ = gated_scan_reference(update, candidate)
    got, _ = gated_scan(update.cuda(), candidate.cuda())
    assert ((got.cpu() - expected).abs() / expected.abs()).max() <= 3e-6


@pytest.mark.parametrize("tokens", ["joint", "interleaved"])
def test_training_on_cuda_follows_the_cpu(tokens):
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = TrajectoryModel(11, 3, ModelConfig(tokens=tokens))
        trainer = Trainer(model, OptimizationConfig(), total_steps=20, device=device)
        losses[device] = [trainer.step(make_batch(step)).loss for step in range(20)]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=1e-3)


def test_acting_on_cuda_follows_the_cpu():
    torch.manual_seed(0)
    model = TrajectoryModel(11, 3)
    actions = {}
    for device in ("cpu", "cuda"):
        agent = DecisionAgent(model.to(device), target_return=100.0)
        generator = np.random.default_rng(0)
        agent.reset(num_envs=8)
        actions[device] = [
            agent.act(generator.normal(size=(8, 11)), generator.normal(size=8)) for _ in range(50)
        ]
    np.testing.assert_allclose(actions["cuda"], actions["cpu"], atol=1e-4)
