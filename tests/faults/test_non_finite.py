"""NaN and infinity, wherever they come from, move nothing and are never saved."""

import dataclasses

import numpy as np
import pytest
import torch
from random_batches import make_batch

from minrl.agents.checkpoint import CheckpointFolder
from minrl.agents.model_config import ModelConfig
from minrl.agents.training import OptimizationConfig, Trainer
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import CheckpointError, TrainingError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train import train
from minrl.scripts.train_config import TrainConfig

FAULTS = 100
BAD = (np.nan, np.inf, -np.inf)
ARRAYS = ("observations", "actions", "returns")


def make_trainer():
    torch.manual_seed(0)
    model = TrajectoryModel(4, 2, ModelConfig(width=16, num_layers=2, dropout=0.1))
    config = OptimizationConfig(warmup_steps=5, ema_decay=0.9)
    return Trainer(model, config, total_steps=1000, seed=3)


def step_with_bad_batch(trainer, batch, generator):
    array = getattr(batch, ARRAYS[generator.integers(len(ARRAYS))])
    array[generator.choice(len(array)), 0] = BAD[generator.integers(len(BAD))]
    return trainer.step(batch)


def step_with_infinite_loss(trainer, batch, generator):
    """Every number is finite but the square of an error: of a last action, which is no input."""
    row = generator.choice(len(batch.actions))
    batch.actions[row, batch.mask[row].sum() - 1] = 1e30
    return trainer.step(batch)


def step_with_bad_gradient(trainer, batch, generator):
    """One element of one gradient; finite ones of which the norm is not are bad as well."""
    parameters = list(trainer.model.parameters())
    parameter = parameters[generator.integers(len(parameters))]
    element = generator.integers(parameter.numel())
    value = [*BAD, 1e30][generator.integers(4)]

    def poison(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[element] = value
        return gradient

    hook = parameter.register_hook(poison)
    try:
        return trainer.step(batch)
    finally:
        hook.remove()


WAYS = (step_with_bad_batch, step_with_infinite_loss, step_with_bad_gradient)


def snapshot(trainer):
    """Return copies of all that a step could move."""
    state = trainer.state_dict()
    del state["step"], state["skips_in_a_row"]
    for group in state["optimizer"]["param_groups"]:
        for name in ("lr", "capturable"):  # set anew by every step
            group.pop(name)
    return copy_of(state)


def copy_of(value):
    if isinstance(value, dict):
        return {key: copy_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copy_of(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_no_step_that_is_not_finite_moves_anything(assert_equal):
    """At random steps; the steps between are those of a training without the others."""
    generator, trainer = np.random.default_rng(0), make_trainer()
    trainer.step(make_batch(0))  # or there would be no moments to compare yet
    faults = 0
    while faults < FAULTS:
        batch = make_batch(trainer.step_count)
        if generator.random() < 0.4:
            assert not trainer.step(batch).skipped
            assert trainer.skips_in_a_row == 0
            continue
        if trainer.skips_in_a_row == 9:
            trainer.step(batch)
            continue
        before = snapshot(trainer)
        report = WAYS[faults % len(WAYS)](trainer, batch, generator)
        assert report.skipped
        assert_equal(snapshot(trainer), before)
        faults += 1
    assert all(tensor.isfinite().all() for tensor in trainer.acting_model.state_dict().values())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (step_with_bad_batch, r"the loss is (nan|inf)"),
        (step_with_infinite_loss, "the loss is inf"),
        (step_with_bad_gradient, r"the (gradient|norm of the gradient) .*"),
    ],
)
def test_ten_in_a_row_end_the_training_saying_where_and_what(way, message, assert_equal):
    generator, trainer = np.random.default_rng(1), make_trainer()
    for step in range(3):
        trainer.step(make_batch(step))
    before = snapshot(trainer)
    for step in range(3, 12):
        assert way(trainer, make_batch(step), generator).skipped
    with pytest.raises(TrainingError, match=rf"10 times in a row, last at step 13: {message}"):
        way(trainer, make_batch(12), generator)
    assert_equal(snapshot(trainer), before)


def test_the_weight_whose_gradient_is_not_finite_is_named():
    trainer = make_trainer()
    name, parameter = list(trainer.model.named_parameters())[5]
    parameter.register_hook(lambda gradient: gradient * float("nan"))
    for step in range(9):
        trainer.step(make_batch(step))
    with pytest.raises(TrainingError, match=rf"last at step 10: the gradient of {name}, though"):
        trainer.step(make_batch(9))


def test_a_bad_batch_does_not_change_the_steps_after_it(assert_equal):
    """But that a step was lost: what comes after starts from the weights before it."""
    trainer, other = make_trainer(), make_trainer()
    for step in range(8):
        if step == 4:
            step_with_bad_batch(trainer, make_batch(step), np.random.default_rng(0))
            other.step_count += 1
        else:
            assert trainer.step(make_batch(step)).loss == other.step(make_batch(step)).loss
    assert_equal(snapshot(trainer), snapshot(other))


@pytest.mark.parametrize("part", ["weights", "moments", "average"])
def test_nothing_that_is_not_finite_is_written(tmp_path, part):
    trainer, folder = make_trainer(), CheckpointFolder(tmp_path)
    trainer.step(make_batch(0))
    folder.save(1, trainer.acting_model.state_dict(), {}, {"trainer": trainer.state_dict()})
    parameter = trainer.model.head.weight
    poisoned = {
        "weights": parameter.data,
        "moments": trainer.update.optimizer.state[parameter]["exp_avg"],
        "average": trainer.acting_model.head.weight.data,
    }
    poisoned[part].view(-1)[0] = np.nan
    with pytest.raises(CheckpointError, match=r"not finite: .*(head\.weight|exp_avg)"):
        folder.save(2, trainer.acting_model.state_dict(), {}, {"trainer": trainer.state_dict()})
    assert folder.steps() == [1]
    assert len(list(tmp_path.iterdir())) == 3


def poison_from(step, until):
    """Make the gradients of all trainings of this process NaN in these steps, but not the loss."""
    from torch.nn.modules.module import register_module_forward_hook

    calls = []

    def poison(module, _inputs, outputs):
        if isinstance(module, TrajectoryModel) and outputs[0].requires_grad:
            calls.append(module)
            if step <= len(calls) <= until:
                outputs[0].register_hook(lambda gradient: gradient * float("nan"))

    return register_module_forward_hook(poison)


def make_config(pendulum_id, path, **options):
    config = TrainConfig(
        dataset=(pendulum_id,),
        model=ModelConfig(width=16, num_layers=1),
        optimization=OptimizationConfig(ema_decay=0.9, schedule="constant"),
        steps=20,
        batch_size=8,
        context=10,
        eval_every=4,
        eval_episodes=0,
        final_episodes=0,
        log_every=4,
        device="cpu",
        run_dir=path,
    )
    return dataclasses.replace(config, **options)


def test_a_run_that_ends_so_leaves_its_last_good_weights(pendulum_id, tmp_path, assert_equal):
    path = tmp_path / "run"
    hook = poison_from(6, 100)
    try:
        with pytest.raises(
            TrainingError, match=r"last at step 15: the gradient of .*, though not the"
        ):
            train(make_config(pendulum_id, path))
    finally:
        hook.remove()
    run = RunFolder(path)
    assert run.checkpoints.last() == 15
    state = run.checkpoints.trainer_state(15)["trainer"]
    train(make_config(pendulum_id, tmp_path / "five", steps=5))
    expected = RunFolder(tmp_path / "five").checkpoints.trainer_state(5)["trainer"]
    for part in ("model", "average"):
        assert_equal(state[part], expected[part])
    assert_equal(state["optimizer"]["state"], expected["optimizer"]["state"])


def test_skipped_steps_are_counted_in_the_metrics(pendulum_id, tmp_path):
    hook = poison_from(6, 7)
    try:
        train(make_config(pendulum_id, tmp_path / "run"))
    finally:
        hook.remove()
    rows = RunFolder(tmp_path / "run").read_metrics()
    name = "train/skipped_steps"
    assert {row["step"]: row[name] for row in rows if name in row} == {8: 2}
