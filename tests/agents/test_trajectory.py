from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minrl.agents.losses import masked_action_loss
from minrl.agents.model_config import ModelConfig
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import ConfigError

KINDS = {
    "interleaved": {"tokens": "interleaved"},
    "joint": {"tokens": "joint"},
    "interleaved-minlstm-convolution": {
        "tokens": "interleaved",
        "backbone": "minlstm",
        "convolution": 3,
    },
    "interleaved-transformer": {
        "tokens": "interleaved",
        "backbone": "transformer",
        "attention_context": 4,
        "num_heads": 2,
    },
    "joint-mamba": {"tokens": "joint", "backbone": "mamba", "expansion": 2},
    "interleaved-timeless": {"tokens": "interleaved", "max_timestep": 0},
    "joint-lstm": {"tokens": "joint", "backbone": "lstm"},
    "observation-mlp": {"tokens": "observation", "backbone": "mlp"},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
B, T, O, A = 3, 20, 5, 2


def make(kind, **options):
    torch.manual_seed(0)
    config = {"width": 16, "num_layers": 2, "max_timestep": 15, **KINDS[kind], **options}
    config = ModelConfig(**config)
    model = TrajectoryModel(O, A, config).double().eval()
    model.action_low.copy_(torch.tensor([-1.0, -3.0]))
    model.action_high.copy_(torch.tensor([1.0, 7.0]))
    return model


def make_inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "observations": draw(B, T, O),
        "actions": draw(B, T, A),
        "returns": 1000 * draw(B, T),
        "timesteps": torch.arange(T).expand(B, T),
    }


def cut(inputs, part):
    return {name: value[:, part] for name, value in inputs.items()}


@every_kind
@given(cuts=st.lists(st.integers(1, T - 1), max_size=4), seed=st.integers(0, 10**6))
def test_split_anywhere_equals_whole(kind, cuts, seed):
    model, inputs = make(kind), make_inputs(seed)
    generator = torch.Generator().manual_seed(seed)
    flags = {
        "resets": torch.rand(B, T, generator=generator) < 0.15,
        "mask": torch.rand(B, T, generator=generator) < 0.8,
    }
    whole, last = model(**inputs, **flags)
    state, parts = None, []
    edges = [0, *sorted(set(cuts)), T]
    for start, stop in pairwise(edges):
        part = slice(start, stop)
        predicted, state = model(**cut(inputs, part), **cut(flags, part), state=state)
        parts.append(predicted)
    mask = flags["mask"]
    torch.testing.assert_close(torch.cat(parts, 1)[mask], whole[mask], atol=1e-10, rtol=0)
    for got, expected in zip(state, last, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@every_kind
def test_step_equals_forward(kind):
    model, inputs = make(kind), make_inputs()
    whole, _ = model(**inputs)
    state = model.initial_state(B)
    for t in range(T):
        predicted, state = model.step(
            inputs["observations"][:, t],
            inputs["returns"][:, t],
            inputs["timesteps"][:, t],
            state,
            torch.full((B,), t == 0),
        )
        torch.testing.assert_close(predicted, whole[:, t], atol=1e-10, rtol=0)
        state = (*state[:-1], inputs["actions"][:, t])  # the action taken was another one


@every_kind
@pytest.mark.parametrize("name", ["observations", "actions", "returns"])
def test_a_prediction_sees_only_what_came_before(kind, name):
    model, inputs = make(kind), make_inputs()
    before, _ = model(**inputs)
    at = 9
    changed = {**inputs, name: inputs[name].clone()}
    changed[name][:, at:] += 100.0
    after, _ = model(**changed)
    first_change = at + 1 if name == "actions" else at  # a_t is predicted, not seen, at step t
    assert torch.equal(after[:, :first_change], before[:, :first_change])
    is_seen = name == "observations" or model.config.tokens != "observation"
    assert torch.equal(after[:, first_change], before[:, first_change]) != is_seen


def gradients_with_padding(kind, inputs, lengths, padding, fill):
    """Loss and gradients of a batch whose rows end early, padded with anything."""
    model = make(kind)
    longest = max(lengths) + padding
    mask = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    padded = {}
    for name, value in inputs.items():
        room = torch.zeros(B, longest, *value.shape[2:], dtype=value.dtype)
        room[:, : max(lengths)] = value[:, : max(lengths)]
        invalid = ~mask.view(B, longest, *[1] * (value.dim() - 2))
        room = room.masked_fill(invalid, 7 if name == "timesteps" else fill)
        padded[name] = room
    predicted, _ = model(**padded, mask=mask)
    reach = model.action_reach
    loss = masked_action_loss(predicted, padded["actions"], mask, reach) / mask.sum()
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return loss.detach(), gradients, [predicted[row, :n] for row, n in enumerate(lengths)]


@every_kind
@pytest.mark.parametrize("padding", [0, 1, 64])
@pytest.mark.parametrize("fill", [0.0, -10.0, 1e30, float("nan"), float("inf")])
def test_padding_changes_nothing(kind, padding, fill):
    inputs, lengths = make_inputs(), [20, 7, 1]
    loss, gradients, predicted = gradients_with_padding(kind, inputs, lengths, padding, fill)
    expected = gradients_with_padding(kind, inputs, lengths, 0, 0.0)
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradients, expected[1], rtol=1e-10, atol=1e-12)
    for got, wanted in zip(predicted, expected[2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("observations", torch.zeros(B, T, 1), r"must be \(B, T, 5\), not \(3, 20, 1\)"),
        ("observations", torch.zeros(T, O), r"must be \(B, T, 5\), not \(20, 5\)"),
        ("actions", torch.zeros(B, T - 1, A), r"must be \(3, 20, 2\), not \(3, 19, 2\)"),
        ("returns", torch.zeros(B, 1), r"must be \(3, 20\), not \(3, 1\)"),
        ("timesteps", torch.arange(T), r"must be \(3, 20\), not \(20,\)"),
        ("mask", torch.ones(B, T), "must be bool of"),
        ("resets", torch.zeros(B, 1, dtype=torch.bool), "must be bool of"),
    ],
)
def test_inputs_of_another_shape_are_refused_by_name(name, given, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        make("joint")(**make_inputs() | {name: given})


def test_loss_is_the_mean_over_valid_steps_in_units_of_the_bounds():
    predicted, actions = torch.randn(2, 2, 3, A, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    reach = torch.tensor([1.0, 5.0], dtype=torch.float64)
    total = 0.0
    for row, step in ((0, 0), (0, 1), (1, 0)):
        for k in range(A):
            total += ((predicted[row, step, k] - actions[row, step, k]) / reach[k]) ** 2 / A
    torch.testing.assert_close(masked_action_loss(predicted, actions, mask, reach), total)


@every_kind
def test_actions_stay_inside_the_bounds(kind):
    model, inputs = make(kind), make_inputs()
    inputs["observations"] *= 1e6
    predicted, _ = model(**inputs)
    assert (predicted >= model.action_low).all()
    assert (predicted <= model.action_high).all()


@every_kind
def test_timesteps_beyond_the_table_share_the_last(kind):
    model, inputs = make(kind), make_inputs()
    late = {**inputs, "timesteps": inputs["timesteps"] + 15}
    before, _ = model(**late)
    if model.embed_timestep is None:
        assert torch.equal(before, model(**inputs)[0])
        return
    with torch.no_grad():
        model.embed_timestep.weight[:-1] += 1 + torch.randn(14, 16)
        assert torch.equal(model(**late)[0], before)
        model.embed_timestep.weight[-1] += 1 + torch.randn(16)
    assert ((model(**late)[0] - before).abs() > 1e-6).any(-1).all()


def test_previous_actions_are_hidden_with_the_chance_asked_for_and_in_training_alone():
    model = make("joint", backbone="mlp").train()  # which sees the action before and no other
    sizes = (64, 50)
    actions, zeros = torch.ones(*sizes, A).double(), torch.zeros(*sizes).double()
    others = (zeros, zeros.long())
    observations = torch.zeros(*sizes, O).double()
    without, _ = model(observations, model.action_middle.expand_as(actions), *others)
    some, _ = model(observations, actions, *others, action_dropout=0.2)
    hidden = (some == without).all(-1)[:, 1:]
    assert hidden.double().mean().item() == pytest.approx(0.2, abs=0.03)
    for axis in (0, 1):  # neither whole sequences nor whole steps
        assert hidden.any(axis).all()
        assert not hidden.all(axis).any()
    acting, _ = model.eval()(observations, actions, *others, action_dropout=0.2)
    assert not (acting == without).all(-1)[:, 1:].any()


@every_kind
def test_embedded_tokens_are_dropped_in_training(kind):
    model, inputs, seen = make(kind, dropout=0.25), make_inputs(), []
    model.backbone.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.train()(**inputs)
    model.eval()(**inputs)
    dropped, whole = seen
    kept = dropped != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.06)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_construction_keeps_the_forget_bias_and_the_initial_state():
    model = make("interleaved-minlstm-convolution", forget_bias=3.0)
    for block in model.backbone.blocks:
        cell = block.mixer.cell
        bound = 1 / cell.input_size**0.5
        rows = cell.bias_ih_l0.view(3, cell.hidden_size)
        assert (rows[0] - 3.0).abs().max() <= bound
        assert rows[1:].abs().max() <= bound
        assert (cell.bias_h0 == 0).all()


@every_kind
def test_one_step_changes_every_parameter_that_is_used(kind):
    model = make(kind).train()
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    model(**make_inputs())[0].square().sum().backward()
    optimizer.step()
    assert [n for n, value in model.named_parameters() if torch.equal(value, before[n])] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backbone", "transformer-xl"),
        ("tokens", "both"),
        ("candidate", "relu"),
        ("width", 0),
        ("num_layers", 0),
        ("expansion", 0),
        ("mlp_ratio", -1),
        ("max_timestep", -1),
        ("condition", "reward"),
        ("timestep_std", -0.1),
        ("timestep_std", float("inf")),
        ("forget_bias", float("nan")),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("return_scale", 0.0),
        ("return_scale", float("inf")),
        ("convolution", -1),
        ("num_heads", 0),
        ("attention_context", 0),
    ],
)
def test_impossible_values_are_named_with_their_range(field, value):
    (problem,) = ModelConfig(**{field: value}).problems()
    with pytest.raises(ConfigError, match=field):
        TrajectoryModel(3, 2, ModelConfig(**{field: value}))
    assert problem.startswith(f"{field} must be")
    assert str(value) in problem


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "transformer", "num_heads": 3},
            "num_heads must divide the width, 64, not 3",
        ),
        (
            {"backbone": "mlp", "mlp_ratio": 0},
            "mlp_ratio must be at least 1 with the backbone mlp, not 0",
        ),
    ],
)
def test_values_that_do_not_go_together_are_named(options, message):
    assert ModelConfig(**options).problems() == [message]
    with pytest.raises(ConfigError, match=message):
        TrajectoryModel(3, 2, ModelConfig(**options))
    name = next(name for name in options if name != "backbone")
    assert ModelConfig(**{name: options[name]}).problems() == []
