"""What a CUDA device must give: the CPU's numbers, to rounding. Run with: pytest -m gpu."""

import numpy as np
import pytest
import torch

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
from minrl.agents.fast_step import GraphStep
from minrl.agents.plain_step import plain_step
from minrl.agents.step_policy import StepPolicy
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


def test_a_cuda_graph_acts_as_the_plain_step_at_any_batch_and_with_changing_weights():
    torch.manual_seed(0)
    policy = StepPolicy(TrajectoryModel(11, 3, ModelConfig(convolution=4)).cuda().eval())
    step = GraphStep(policy)
    generator = np.random.default_rng(0)
    for batch in (1, 256, 8):
        state = other = policy.initial_state(batch).detach()
        for t in range(10):
            inputs = (
                generator.normal(size=(batch, 11)).astype(np.float32),
                generator.normal(size=batch) * 1000,
                np.full(batch, t),
                (generator.random(batch) < 0.2) | (t == 0),
            )
            expected, state = plain_step(policy, *inputs, state)
            actions, other = step(*inputs, other)
            np.testing.assert_allclose(actions, expected, atol=1e-5)
            np.testing.assert_allclose(other.cpu(), state.cpu(), atol=1e-4)
            with torch.no_grad():
                policy.model.head.weight.mul_(1.01)
    assert step._graph is not None
