import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from random_batches import make_batch

from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import CheckpointError, ConfigError, TrainingError


def make_trainer(
    seed=0,
    dropout=0.1,
    tokens="interleaved",
    width=16,
    num_layers=2,
    observation_size=4,
    **options,
):
    torch.manual_seed(seed)
    shape = ModelConfig(width=width, num_layers=num_layers, dropout=dropout, tokens=tokens)
    model = TrajectoryModel(observation_size, 2, shape)
    config = OptimizationConfig(**{"warmup_steps": 5, "schedule": "constant", **options})
    return Trainer(model, config, total_steps=40, seed=seed)


def assert_same(state, expected):
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_same(state[key], value)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(state[key], value), key


def weights(trainer):
    return torch.cat([value.flatten().float() for value in trainer.model.state_dict().values()])


def run(trainer, steps):
    return [trainer.step(make_batch(trainer.step_count)).loss for _ in range(steps)]


@pytest.mark.parametrize("steps", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_same_seed_same_run_and_another_seed_another(steps):
    first, second, third = make_trainer(), make_trainer(), make_trainer(seed=1)
    assert run(first, steps) == run(second, steps) != run(third, steps)
    assert_same(first.state_dict(), second.state_dict())
    actions = [rollout(trainer.acting_model) for trainer in (first, second)]
    assert np.array_equal(*actions)


def rollout(model):
    agent = DecisionAgent(model, target_return=1.0)
    observations = np.random.default_rng(0).normal(size=(20, 3, 4)).astype(np.float32)
    return np.stack([agent.act(row, np.ones(3)) for row in observations])


def test_the_first_step_moves_every_weight():
    trainer = make_trainer(dropout=0.0)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.step(make_batch(0, rows=64))
    same = [n for n, value in trainer.model.named_parameters() if torch.equal(value, before[n])]
    assert same == []


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
    assert losses[0] != expected[0]  # the products are not those of float32
    assert all(parameter.dtype is torch.float32 for parameter in trainer.model.parameters())


def test_the_loss_is_in_units_of_the_action_bounds():
    plain, wide = make_trainer(dropout=0.0), make_trainer(dropout=0.0)
    wide.model.action_low.fill_(-4.0)
    wide.model.action_high.fill_(4.0)
    batch = make_batch(0)
    larger = dataclasses.replace(batch, actions=4 * batch.actions)
    assert wide.step(larger).loss == pytest.approx(plain.step(batch).loss, rel=1e-5)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_action_error_is_that_of_the_weights_that_act_without_dropout(ema_decay):
    trainer = make_trainer(dropout=0.3, ema_decay=ema_decay, learning_rate=0.1)
    run(trainer, 5)
    held_out = [make_batch(100, rows=3), make_batch(101)]
    model, errors = copy.deepcopy(trainer.acting_model).eval(), []
    for batch in held_out:
        inputs = (batch.observations, batch.actions, batch.returns, batch.timesteps)
        predicted, _ = model(*map(torch.from_numpy, inputs))
        errors.append((predicted.detach().numpy() - batch.actions)[batch.loss_mask])
    expected = np.square(np.concatenate(errors)).mean()
    assert trainer.action_error(held_out) == pytest.approx(expected, rel=1e-5)


def test_every_seed_step_and_rank_draws_another_dropout():
    trainer, drawn = make_trainer(), set()
    for numbers in itertools.product(range(3), repeat=3):
        torch.manual_seed(0)
        trainer.seed, trainer.step_count, trainer.rank = numbers
        trainer._begin(1)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 27


@pytest.mark.parametrize("name", ["action_dropout", "return_noise"])
def test_inputs_are_disturbed_in_training_only(name):
    trainer = make_trainer(dropout=0.0, **{name: 0.5})
    held_out = [make_batch(100)]
    assert trainer.action_error(held_out) == trainer.action_error(held_out)
    plain = make_trainer(dropout=0.0)
    assert trainer.action_error(held_out) == plain.action_error(held_out)
    assert run(trainer, 1) != run(plain, 1)


def test_return_noise_is_one_factor_for_each_window_of_all_processes():
    trainer = make_trainer(return_noise=0.2)
    factors = trainer._return_factors(5000)
    assert (factors.shape, factors.dtype) == ((5000, 1), np.float32)
    assert factors.mean() == pytest.approx(1, abs=0.02)
    assert factors.std() == pytest.approx(0.2, abs=0.01)
    trainer.rank = 1
    assert np.array_equal(trainer._return_factors(5000), factors)
    for number in ("step_count", "seed"):
        other = make_trainer(return_noise=0.2)
        setattr(other, number, 7)
        assert np.abs(np.corrcoef(other._return_factors(5000)[:, 0], factors[:, 0])[0, 1]) < 0.1
    assert (make_trainer(return_noise=0.0)._return_factors(3) == 1).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schedule", "step"),
        ("precision", "float16"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("weight_decay", float("inf")),
        ("gradient_clip", -1.0),
        ("warmup_steps", -1),
        ("ema_decay", 1.0),
        ("action_dropout", 1.5),
        ("return_noise", -0.1),
    ],
)
def test_impossible_values_are_named_with_their_range(field, value):
    (problem,) = OptimizationConfig(**{field: value}).problems()
    with pytest.raises(ConfigError, match=field):
        Trainer(torch.nn.Linear(1, 1), OptimizationConfig(**{field: value}), total_steps=1)
    assert problem.startswith(f"{field} must")
    assert str(value) in problem


def drop(tensors, key):
    del tensors[key]


def reshape(tensors, key):
    tensors[key] = tensors[key][..., :1].clone()


def add(tensors, key):
    tensors["unknown"] = tensors[key]


def retype(tensors, key):
    tensors[key] = tensors[key].double()


HEAD = "head.weight"


@pytest.mark.parametrize("part", ["model", "average"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "model has no head.weight"),
        (add, "model has unknown, which is unknown here"),
        (reshape, r"model's head.weight is \(2, 1\) torch.float32, not \(2, 16\) torch.float32"),
        (retype, r"model's head.weight is \(2, 16\) torch.float64, not \(2, 16\) torch.float32"),
    ],
)
def test_weights_that_do_not_fit_are_named_and_change_nothing(part, change, message):
    state = copy.deepcopy(make_trainer(seed=1, ema_decay=0.9).state_dict())
    change(state[part], HEAD)
    assert_refused(make_trainer(ema_decay=0.9), state, message)


def assert_refused(trainer, state, message):
    run(trainer, 2)
    before = copy.deepcopy(trainer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        trainer.load_state_dict(state)
    assert_same(trainer.state_dict(), before)
    assert trainer.step_count == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda moments: drop(moments, "exp_avg"), r"the optimizer's [\w.]+ has no exp_avg"),
        (lambda moments: reshape(moments, "exp_avg"), r"exp_avg of [\w.]+ is \(.*, not \("),
        (lambda moments: add(moments, "exp_avg"), "has unknown, which is unknown here"),
        (lambda moments: moments.update(exp_avg_sq=None), r"exp_avg_sq of [\w.]+ is no tensor"),
    ],
)
def test_moments_that_do_not_fit_are_named_and_change_nothing(change, message):
    other = make_trainer()
    run(other, 1)
    state = copy.deepcopy(other.state_dict())
    sizes = {
        index: value["exp_avg"].numel() for index, value in state["optimizer"]["state"].items()
    }
    change(state["optimizer"]["state"][max(sizes, key=sizes.get)])
    assert_refused(make_trainer(), state, message)


OTHERS = {
    "wider": ({"width": 32}, r"the model's [\w.]+ is \(.*32.*, not \(.*16"),
    "deeper": ({"num_layers": 3}, "which is unknown here"),
    "observations": ({"observation_size": 5}, r"the model's [\w.]+ is \(.*5.*, not \(.*4"),
    "with-average": ({"ema_decay": 0.9}, "averaged weights, which ema_decay 0 has no use for"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_state_of_another_model_is_refused_and_changes_nothing(case):
    options, message = OTHERS[case]
    other = make_trainer(**options)
    assert_refused(make_trainer(), copy.deepcopy(other.state_dict()), message)


def test_a_state_with_a_part_missing_is_refused():
    state = copy.deepcopy(make_trainer().state_dict())
    del state["optimizer"]
    assert_refused(make_trainer(), state, "the state of training has no optimizer")
    assert_refused(make_trainer(), None, "the state of training is missing")
    without = copy.deepcopy(make_trainer().state_dict())
    assert_refused(make_trainer(ema_decay=0.9), without, "the averaged model is missing")


def test_steps_skipped_before_a_resume_count_among_those_in_a_row():
    trainer, resumed = make_trainer(), make_trainer(seed=1)
    poisoned = make_batch(0)
    poisoned.observations[0, 0] = np.nan
    for _ in range(9):
        assert trainer.step(poisoned).skipped
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.skips_in_a_row == 9
    with pytest.raises(TrainingError, match="10 times in a row, last at step 10"):
        resumed.step(poisoned)


def test_an_error_of_a_step_leaves_the_weights_those_of_the_steps_before():
    trainer = make_trainer()
    run(trainer, 2)
    batch = make_batch(2)
    wrong = dataclasses.replace(batch, observations=batch.observations[..., :3])
    with pytest.raises(ValueError, match="observations must be"):
        trainer.step(wrong)
    assert trainer.is_between_steps
    assert trainer.step_count == 2
