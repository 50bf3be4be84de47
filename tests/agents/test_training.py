import dataclasses

import numpy as np
import pytest
import torch

from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import ModelConfig, TrajectoryModel
from minrl.data.windows import Batch
from minrl.errors import TrainingError


def make_batch(step, rows=8, length=6):
    generator = np.random.default_rng((7, step))
    lengths = generator.integers(1, length + 1, size=rows)
    mask = np.arange(length) < lengths[:, None]
    return Batch(
        observations=generator.normal(size=(rows, length, 4)).astype(np.float32),
        actions=np.tanh(generator.normal(size=(rows, length, 2))).astype(np.float32),
        returns_to_go=generator.normal(size=(rows, length)).astype(np.float32),
        timesteps=np.tile(np.arange(length), (rows, 1)),
        mask=mask,
        loss_mask=mask,
    )


def make_trainer(seed=0, dropout=0.1, tokens="interleaved", **options):
    torch.manual_seed(seed)
    model = TrajectoryModel(
        4, 2, ModelConfig(width=16, num_layers=2, dropout=dropout, tokens=tokens)
    )
    config = OptimizationConfig(**{"warmup_steps": 5, "schedule": "constant", **options})
    return Trainer(model, config, total_steps=40, seed=seed)


def weights(trainer):
    return torch.cat([value.flatten().float() for value in trainer.model.state_dict().values()])


def run(trainer, steps):
    return [trainer.step(make_batch(trainer.step_count)).loss for _ in range(steps)]


OPTIONS = {
    "plain": {},
    "ema": {"ema_decay": 0.9},
    "cosine-joint": {"schedule": "cosine", "tokens": "joint"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("cut", [1, 13, 29])
def test_resume_is_exact_at_any_cut(options, cut, tmp_path):
    whole = make_trainer(**options)
    losses = run(whole, 30)
    first = make_trainer(**options)
    run(first, cut)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make_trainer(seed=0, **options)
    run(second, 3)  # other weights, which loading must replace
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert run(second, 30 - cut) == losses[cut:]
    assert torch.equal(weights(second), weights(whole))
    for ours, theirs in zip(
        second.acting_model.state_dict().values(),
        whole.acting_model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_same_seed_same_run_and_another_seed_another():
    first, second, third = make_trainer(), make_trainer(), make_trainer(seed=1)
    assert run(first, 10) == run(second, 10) != run(third, 10)
    assert torch.equal(weights(first), weights(second))


def test_the_first_step_moves_every_weight():
    trainer = make_trainer(dropout=0.0)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.step(make_batch(0, rows=64))
    same = [n for n, value in trainer.model.named_parameters() if torch.equal(value, before[n])]
    assert same == []


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["observations", "actions", "returns_to_go"])
def test_a_step_that_is_not_finite_changes_no_weight(bad, where):
    trainer = make_trainer(ema_decay=0.9)
    run(trainer, 3)
    before = trainer.state_dict()
    before = {part: before[part] for part in ("model", "average")}
    before = {p: {k: v.clone() for k, v in s.items()} for p, s in before.items()}
    batch = make_batch(3)
    getattr(batch, where)[0, 0] = bad
    report = trainer.step(batch)
    assert report.skipped
    after = trainer.state_dict()
    for part, values in before.items():
        assert all(torch.equal(after[part][name], value) for name, value in values.items())
    assert not trainer.step(make_batch(4)).skipped
    assert trainer.skips_in_a_row == 0


def test_a_gradient_that_is_not_finite_changes_no_weight():
    trainer = make_trainer()
    run(trainer, 3)
    before = weights(trainer)
    parameter = trainer.model.head.weight
    hook = parameter.register_hook(lambda gradient: gradient * float("nan"))
    assert trainer.step(make_batch(3)).skipped
    assert torch.equal(weights(trainer), before)
    hook.remove()
    assert not trainer.step(make_batch(4)).skipped


def test_training_stops_after_ten_bad_steps_in_a_row_with_the_weights_intact():
    trainer = make_trainer()
    run(trainer, 3)
    before = weights(trainer)
    batch = make_batch(3)
    batch.observations[:] = np.nan
    for _ in range(9):
        assert trainer.step(batch).skipped
    with pytest.raises(TrainingError, match="10 times in a row, last at step 13"):
        trainer.step(batch)
    assert torch.equal(weights(trainer), before)


def test_padding_may_be_anything():
    clean, dirty = make_trainer(), make_trainer()
    batch = make_batch(0)
    poisoned = {
        name: np.where(batch.mask[..., None] if value.ndim == 3 else batch.mask, value, np.nan)
        for name, value in vars(batch).items()
        if value.dtype == np.float32
    }
    filled = dataclasses.replace(
        batch, **{name: value.astype(np.float32) for name, value in poisoned.items()}
    )
    assert clean.step(batch).loss == dirty.step(filled).loss
    assert torch.equal(weights(clean), weights(dirty))


def test_learning_rate_warms_up_then_stays_or_falls_to_zero():
    constant = make_trainer(learning_rate=1.0, warmup_steps=4)
    assert [constant.learning_rate_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = make_trainer(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    rates = [cosine.learning_rate_at(step) for step in range(4, 41)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 1
    assert rates[18] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def test_average_is_the_exponential_moving_average():
    trainer = make_trainer(ema_decay=0.9)
    run(trainer, 1)
    expected = weights(trainer)
    for _ in range(4):
        run(trainer, 1)
        expected = 0.9 * expected + 0.1 * weights(trainer)
    state = trainer.acting_model.state_dict().values()
    got = torch.cat([value.flatten().float() for value in state])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_bfloat16_trains_and_keeps_float32_weights():
    trainer = make_trainer(precision="bfloat16", dropout=0.0)
    exact = make_trainer(dropout=0.0)
    losses, expected = run(trainer, 20), run(exact, 20)
    np.testing.assert_allclose(losses, expected, rtol=0.03)
    assert all(parameter.dtype is torch.float32 for parameter in trainer.model.parameters())


def test_action_dropout_hides_previous_actions_in_training_only():
    trainer = make_trainer(dropout=0.0, action_dropout=0.5)
    held_out = [make_batch(100)]
    assert trainer.action_error(held_out) == trainer.action_error(held_out)
    plain = make_trainer(dropout=0.0)
    assert trainer.action_error(held_out) == plain.action_error(held_out)
    assert run(trainer, 1) != run(plain, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "step"),
        ("precision", "float16"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("gradient_clip", -1.0),
        ("warmup_steps", -1),
        ("ema_decay", 1.0),
        ("action_dropout", 1.5),
    ],
)
def test_impossible_values_are_named_with_their_range(field, value):
    (problem,) = OptimizationConfig(**{field: value}).problems()
    assert problem.startswith(f"{field} must")
    assert str(value) in problem
