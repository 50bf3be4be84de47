import copy

import numpy as np
import pytest
import torch
from torch import nn

from minrl.agents.device_step import ResidentStep
from minrl.agents.losses import masked_action_loss
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.episodes import DatasetInfo, Episode, Episodes
from minrl.data.windows import WindowSampler
from minrl.errors import TrainingError


def make_sampler(burn_in=0, context=6):
    generator = np.random.default_rng(0)
    episodes = [
        Episode(
            observations=generator.normal(size=(steps + 1, 4)),
            actions=np.tanh(generator.normal(size=(steps, 2))),
            rewards=generator.normal(size=steps),
            terminated=True,
            truncated=False,
        )
        for steps in (1, 30, 7, 12, 3)
    ]
    info = DatasetInfo("test/toy-v0", None, 4, (-1.0, -1.0), (1.0, 1.0))
    episodes = Episodes.from_episodes(episodes, info)
    return WindowSampler(episodes, context=context, batch_size=16, seed=3, burn_in=burn_in)


def make_trainer(dropout=0.1, tokens="interleaved", **options):
    torch.manual_seed(0)
    shape = ModelConfig(width=16, num_layers=2, dropout=dropout, tokens=tokens, max_timestep=30)
    config = OptimizationConfig(**{"warmup_steps": 5, **options})
    return Trainer(TrajectoryModel(4, 2, shape), config, total_steps=40, seed=1)


def tensors_of(state):
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors_of(value)]
    if isinstance(state, list):
        return [tensor for value in state for tensor in tensors_of(value)]
    return [state.clone()] if isinstance(state, torch.Tensor) else []


def assert_same(states, others):
    for one, other in zip(tensors_of(states), tensors_of(others), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("context", "burn_in"), [(6, 0), (6, 4), (30, 0), (1, 0)])
def test_windows_gathered_on_the_device_are_those_of_the_batch(context, burn_in):
    sampler, trainer = make_sampler(burn_in, context), make_trainer()
    resident = ResidentStep(sampler, trainer.update, 16)
    for step in range(20):
        resident.windows.copy_(torch.from_numpy(sampler.windows(step)))
        inputs, batch = resident.gather(), sampler.batch(step)
        for name, expected in vars(batch).items():
            got = inputs[name].numpy()
            assert got.dtype == expected.dtype
            assert got.shape == expected.shape
            where = ... if name.endswith("mask") else batch.mask
            assert np.array_equal(got[where], expected[where])


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"tokens": "joint", "dropout": 0.0}])
def test_steps_on_resident_data_are_the_steps_on_its_batches(options):
    sampler = make_sampler(burn_in=2)
    resident, given = make_trainer(**options), make_trainer(**options)
    for step in range(12):
        report, expected = resident.step_from(sampler), given.step(sampler.batch(step))
        assert (report.loss, report.grad_norm) == (expected.loss, expected.grad_norm)
    assert_same(resident.state_dict(), given.state_dict())


def test_a_step_is_that_of_adamw_on_the_clipped_gradient_of_the_masked_mean():
    sampler = make_sampler()
    trainer = make_trainer(
        dropout=0.0, learning_rate=0.01, gradient_clip=0.05, weight_decay=0.2, return_noise=0.0
    )
    model = copy.deepcopy(trainer.model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=0.2, fused=False, foreach=False
    )
    for step in range(8):
        batch = {k: torch.from_numpy(v) for k, v in vars(sampler.batch(step)).items()}
        loss_mask = batch.pop("loss_mask")
        optimizer.zero_grad()
        predicted, _ = model(**batch)
        error = masked_action_loss(predicted, batch["actions"], loss_mask, torch.ones(2))
        loss = error / loss_mask.sum()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert norm > 0.05  # or nothing would be clipped
        optimizer.param_groups[0]["lr"] = trainer.learning_rate_at(step)
        optimizer.step()
        report = trainer.step_from(sampler)
        assert report.loss == pytest.approx(loss.item(), rel=1e-4)
        assert report.grad_norm == pytest.approx(float(norm), rel=1e-3)
    for got, expected in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("steps_before", [0, 5])
def test_warming_up_on_an_empty_batch_changes_nothing(steps_before):
    """A step is captured by doing it a few times on windows without steps."""
    sampler, trainer = make_sampler(), make_trainer(ema_decay=0.9)
    expected = make_trainer(ema_decay=0.9)
    for _ in range(steps_before):
        trainer.step_from(sampler)
        expected.step_from(sampler)
    trainer.update.numbers.zero_()
    empty = ResidentStep(sampler, trainer.update, 16)
    for _ in range(3):
        assert empty(np.zeros((4, 16), np.int64), np.ones((16, 1), np.float32))[0].isnan()
    for _ in range(5):
        assert trainer.step_from(sampler).loss == expected.step_from(sampler).loss
    assert_same(trainer.state_dict(), expected.state_dict())


def test_reports_read_late_say_the_same_and_skipped_steps_still_change_nothing():
    """On a GPU the host looks at a step when it has already given it the next."""
    sampler, late, prompt = make_sampler(), make_trainer(), make_trainer()
    late._reports_behind = 1
    losses = [[trainer.step_from(sampler).loss for _ in range(6)] for trainer in (late, prompt)]
    assert losses[0] == losses[1]
    bad = sampler.batch(0)
    bad.observations[:] = np.nan
    late.step(bad)
    assert late.skips_in_a_row == 1
    assert not late.step_from(sampler).skipped
    assert late.skips_in_a_row == 0
    before = tensors_of(late.model.state_dict())
    for _ in range(10):
        late.step(bad)
    with pytest.raises(TrainingError, match="10 times in a row, last at step 18"):
        late.step(bad)
    assert_same(late.model.state_dict(), {str(n): value for n, value in enumerate(before)})
