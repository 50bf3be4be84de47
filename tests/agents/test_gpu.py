"""What a CUDA device must give: the CPU's numbers, to rounding. Run with: pytest -m gpu."""

import functools

import numpy as np
import pytest
import torch
from random_batches import make_batch

from minrl import DecisionAgent, TrajectoryModel
from minrl.agents.checkpoint import CheckpointFolder
from minrl.agents.fast_step import GraphStep
from minrl.agents.model_config import ModelConfig
from minrl.agents.plain_step import plain_step
from minrl.agents.step_policy import StepPolicy
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.data.windows import WindowSampler
from minrl.errors import TrainingError
from minrl.scripts.benchmarks.synthetic import make_episodes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("tokens", ["joint", "interleaved"])
def test_training_on_cuda_follows_the_cpu(tokens):
    losses = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = TrajectoryModel(11, 3, ModelConfig(tokens=tokens))
        trainer = Trainer(model, OptimizationConfig(), total_steps=20, device=device)
        reports = [trainer.step(make_batch(step, 64, 20, 11, 3)) for step in range(20)]
        losses[device] = [report.loss for report in reports]
    np.testing.assert_allclose(losses["cuda"], losses["cpu"], rtol=1e-3)


def make_sampler():
    return WindowSampler(make_episodes(10_000), context=20, batch_size=64, seed=0, burn_in=3)


def make_trainer(precision="bfloat16", **options):
    torch.manual_seed(0)
    model = TrajectoryModel(11, 3, ModelConfig(tokens="interleaved", dropout=0.1))
    config = OptimizationConfig(precision=precision, ema_decay=0.99, **options)
    return Trainer(model, config, total_steps=200, device="cuda")


def assert_same_weights(one, other):
    for model in ("model", "acting_model"):
        states = (getattr(trainer, model).state_dict().values() for trainer in (one, other))
        assert all(torch.equal(*values) for values in zip(*states, strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_are_the_steps_on_given_batches(precision):
    """With dropout and average; that it cannot be captured would be a warning, so an error."""
    sampler = make_sampler()
    captured, eager = make_trainer(precision), make_trainer(precision)
    losses = [[], []]
    for step in range(30):
        losses[0].append(captured.step_from(sampler))
        losses[1].append(eager.step(sampler.batch(step)))
    got, expected = ([report.loss for report in reports] for reports in losses)
    np.testing.assert_allclose(got, expected, rtol=1e-3)
    assert not any(report.skipped for reports in losses for report in reports)


@pytest.mark.parametrize("cut", [1, 17])
def test_captured_training_resumes_bit_for_bit(cut, tmp_path):
    sampler = make_sampler()
    whole, first, second = make_trainer(), make_trainer(), make_trainer()
    expected = [whole.step_from(sampler) for _ in range(40)]
    for _ in range(cut):
        first.step_from(sampler)
    folder = CheckpointFolder(tmp_path)
    folder.save(cut, {}, {}, {"trainer": first.state_dict()})
    for _ in range(3):  # other weights and another capture, which loading must replace
        second.step_from(sampler)
    second.load_state_dict(folder.trainer_state(cut)["trainer"])
    got = [second.step_from(sampler) for _ in range(40 - cut)]
    assert [report.loss for report in got] == [report.loss for report in expected[cut:]]
    assert_same_weights(whole, second)


def test_a_captured_step_draws_other_random_numbers_every_time():
    sampler = make_sampler()
    still = make_trainer(learning_rate=1e-30, return_noise=0.0)
    sampler.windows = lambda _step: WindowSampler.windows(sampler, 0)
    losses = {still.step_from(sampler).loss for _ in range(5)}
    assert len(losses) == 5


def test_captured_steps_that_are_not_finite_change_nothing_and_stop_after_ten():
    sampler, trainer = make_sampler(), make_trainer()
    for _ in range(5):
        trainer.step_from(sampler)
    before = [value.clone() for value in trainer.model.state_dict().values()]
    trainer._resident.observations.fill_(torch.nan)  # the graph reads it where it is
    for _ in range(10):
        trainer.step_from(sampler)
    with pytest.raises(TrainingError, match="10 times in a row, last at step 15"):
        trainer.step_from(sampler)
    after = trainer.model.state_dict().values()
    assert all(torch.equal(*values) for values in zip(before, after, strict=True))


def test_acting_on_cuda_follows_the_cpu():
    torch.manual_seed(0)
    config = ModelConfig(condition="return-to-go", max_timestep=1000)
    model = TrajectoryModel(11, 3, config)
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
    assert not isinstance(step._step, functools.partial)  # as it is where capturing failed
