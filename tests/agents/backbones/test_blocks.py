"""One tester for every backbone: what design.md promises of the state protocol."""

import copy
import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from minrl.agents.backbones.blocks import MIXERS, Backbone

WIDTH = 8
KINDS = {
    **{name: {"backbone": name} for name in MIXERS},
    "transformer": {"backbone": "transformer", "context": 5, "num_heads": 2},
    "minlstm-unnormalised": {"backbone": "minlstm", "normalize": False},
    "mingru-convolution": {"backbone": "mingru", "convolution": 4},
    "mingru-wide-no-mlp": {"backbone": "mingru", "expansion": 2, "mlp_ratio": 0},
    "zero-initial-state": {"backbone": "lstm", "learn_initial_state": False},
}
every_backbone = pytest.mark.parametrize("kind", KINDS)


def make(kind):
    torch.manual_seed(0)
    backbone = Backbone(WIDTH, 2, **KINDS[kind]).double().eval()
    for name, parameter in backbone.named_parameters():
        if "bias_h0" in name:
            torch.nn.init.normal_(parameter)
    return backbone


def make_inputs(seed=0, batch=3, length=24):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)
    resets = torch.rand(batch, length, generator=generator) < 0.15
    mask = torch.rand(batch, length, generator=generator) < 0.7
    return x, resets, mask


@every_backbone
def test_parallel_equals_step(kind):
    backbone = make(kind)
    x, resets, _ = make_inputs()
    whole, last = backbone(x, resets=resets)
    state, steps = backbone.initial_state(3), []
    for t in range(x.shape[1]):
        y, state = backbone.step(x[:, t], state, resets[:, t])
        steps.append(y)
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-10, rtol=0)
    for got, expected in zip(state, last, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("length", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "tolerance", "of_state"),
    [
        (torch.float64, 1e-10, 1e-10),
        (torch.float32, 1e-5, 1e-5),
        (torch.bfloat16, 2**-7, 1e-5),  # of the largest output: a unit in the last place
    ],
    ids=str,
)
@pytest.mark.parametrize("convolution", [0, 4])
@pytest.mark.parametrize("name", ["mingru", "minlstm"])
def test_three_blocks_act_as_they_learn(name, convolution, dtype, tolerance, of_state, length):
    torch.manual_seed(0)
    backbone = Backbone(64, 3, backbone=name, convolution=convolution).to(dtype).eval()
    x = torch.randn(2, length, 64).to(dtype)
    with torch.no_grad():
        whole, last = backbone(x)
        state, steps = backbone.initial_state(2), []
        for t in range(length):
            y, state = backbone.step(x[:, t], state)
            steps.append(y)
    largest = whole.abs().max() if dtype is torch.bfloat16 else 1.0
    assert (torch.stack(steps, 1) - whole).abs().max() <= tolerance * largest
    for got, expected in zip(state, last, strict=True):
        torch.testing.assert_close(got, expected, atol=of_state, rtol=0)


@pytest.mark.parametrize("examples", [30, pytest.param(200, marks=pytest.mark.slow)])
@every_backbone
def test_split_anywhere_equals_whole(kind, examples):
    backbone = make(kind)

    @settings(max_examples=examples)
    @given(cuts=st.sets(st.integers(1, 23), max_size=8), seed=st.integers(0, 10**6))
    @example(cuts=set(range(1, 24)), seed=0)
    def check(cuts, seed):
        x, resets, mask = make_inputs(seed)
        whole, last = backbone(x, resets=resets, mask=mask)
        state, parts = None, []
        for start, stop in pairwise([0, *sorted(cuts), 24]):
            part = slice(start, stop)
            y, state = backbone(x[:, part], state, resets=resets[:, part], mask=mask[:, part])
            parts.append(y)
        together = torch.cat(parts, 1)
        torch.testing.assert_close(together[mask], whole[mask], atol=1e-10, rtol=0)
        for got, expected in zip(state, last, strict=True):
            torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)

    check()


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
@every_backbone
def test_later_inputs_do_not_change_earlier_outputs(kind, times):
    backbone = make(kind).float()
    generator = torch.Generator().manual_seed(0)
    for draw in range(times):
        x = make_inputs(draw, length=60)[0].float()
        t = int(torch.randint(1, 60, (), generator=generator))
        before, _ = backbone(x)
        changed = x.clone()
        changed[:, t:] += 10 * torch.randn(changed[:, t:].shape, generator=generator)
        after, _ = backbone(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@every_backbone
def test_a_reset_starts_from_the_initial_state(kind):
    backbone = make(kind)
    x, *_ = make_inputs()
    resets = torch.zeros(3, 24, dtype=torch.bool)
    resets[1, 10] = True
    y, _ = backbone(x, resets=resets)
    plain, _ = backbone(x, resets=torch.zeros_like(resets))
    fresh, _ = backbone(x[1:2, 10:])
    torch.testing.assert_close(y[1:2, 10:], fresh, atol=1e-12, rtol=0)
    assert torch.equal(y[[0, 2]], plain[[0, 2]])


@every_backbone
@pytest.mark.parametrize("poisoned", ["input", "state"])
def test_a_reset_forgets_what_is_not_a_number(kind, poisoned):
    backbone = make(kind)
    x, *_ = make_inputs()
    resets = torch.zeros(3, 24, dtype=torch.bool)
    resets[:, 10] = True
    clean, kept = backbone(x, resets=resets)
    _, state = backbone(x)
    if poisoned == "input":
        x[:, 3] = math.nan
    else:  # what counts the transformer's tokens is no content
        counts = kind == "transformer"
        state = tuple(s if counts and s.shape[-1] == 1 else s * math.nan for s in state)
    y, last = backbone(x, state if poisoned == "state" else None, resets=resets)
    pairs = zip((y[:, 10:], *last), (clean[:, 10:], *kept), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)
    if KINDS[kind]["backbone"] != "mlp":  # it is seen until then
        assert y[:, 3:5].isnan().all()


@every_backbone
def test_invalid_steps_leave_no_trace(kind):
    backbone = make(kind)
    x, _, mask = make_inputs()
    mask[:, 0] = True
    y, state = backbone(x.masked_fill(~mask.unsqueeze(-1), float("nan")), mask=mask)
    for row in range(3):
        alone, last = backbone(x[row, mask[row]].unsqueeze(0))
        torch.testing.assert_close(y[row, mask[row]], alone[0], atol=1e-12, rtol=0)
        for got, expected in zip(state, last, strict=True):
            torch.testing.assert_close(got[row], expected[0], atol=1e-12, rtol=0)


@every_backbone
def test_invalid_steps_leave_no_trace_in_gradients(kind):
    gradients = []
    for fill in (0.0, float("nan")):
        backbone = make(kind)
        x, _, mask = make_inputs()
        y, _ = backbone(x.masked_fill(~mask.unsqueeze(-1), fill), mask=mask)
        y[mask].square().sum().backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    for with_zero, with_nan in zip(*gradients, strict=True):
        assert torch.equal(with_zero, with_nan)


@every_backbone
@pytest.mark.parametrize("outputs", [slice(1, None, 3), slice(-1, None), slice(0, 0)])
def test_outputs_asked_for_are_those_of_the_whole(kind, outputs):
    backbone = make(kind)
    x, resets, mask = make_inputs()
    whole, last = backbone(x, resets=resets, mask=mask)
    some, after = backbone(x, resets=resets, mask=mask, outputs=outputs)
    torch.testing.assert_close(some, whole[:, outputs], atol=1e-12, rtol=0)
    for got, expected in zip(after, last, strict=True):
        assert torch.equal(got, expected)


@every_backbone
def test_reset_state_touches_only_its_rows(kind):
    backbone = make(kind)
    _, state = backbone(make_inputs()[0])
    mask = torch.tensor([False, True, False])
    after = backbone.reset_state(state, mask)
    for old, new, fresh in zip(state, after, backbone.initial_state(3), strict=True):
        assert torch.equal(new[~mask], old[~mask])
        torch.testing.assert_close(new[mask], fresh[mask].to(new.dtype))


@every_backbone
def test_one_step_changes_every_parameter(kind):
    backbone = make(kind)
    before = {name: value.clone() for name, value in backbone.named_parameters()}
    optimizer = torch.optim.Adam(backbone.parameters(), lr=1e-2)
    backbone(make_inputs()[0])[0].square().sum().backward()
    optimizer.step()
    unchanged = [
        name for name, value in backbone.named_parameters() if (value == before[name]).all()
    ]
    assert unchanged == []


@pytest.mark.parametrize("options", [{"mlp_ratio": 0}, {"backbone": "mlp"}], ids=["mixer", "mlp"])
def test_in_training_part_of_what_mixer_or_mlp_add_is_dropped(options):
    backbone = Backbone(WIDTH, 1, dropout=0.25, **options).double()
    x, *_ = make_inputs()
    added = backbone(x)[0] - x
    whole = backbone.eval()(x)[0] - x
    kept = added != 0
    assert kept.double().mean().item() == pytest.approx(0.75, abs=0.08)
    torch.testing.assert_close(added[kept], whole[kept] / 0.75)


@every_backbone
def test_other_layouts_are_the_same_sequences(kind):
    backbone = make(kind)
    x, resets, mask = make_inputs()
    expected, last = backbone(x, resets=resets, mask=mask)
    alone, _ = backbone(x[0], resets=resets[0], mask=mask[0])
    torch.testing.assert_close(alone, expected[0])
    backbone.batch_first = False
    moved = (y.transpose(0, 1) for y in (x, resets, mask))
    output, state = backbone(next(moved), resets=next(moved), mask=next(moved))
    torch.testing.assert_close(output.transpose(0, 1), expected)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("shape", [(3, 24, WIDTH + 1), (WIDTH,), (1, 3, 24, WIDTH)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=f"Expected input of .B, T, {WIDTH}."):
        Backbone(WIDTH)(torch.zeros(shape))


@pytest.mark.parametrize("options", [{"convolution": 4}, {"backbone": "gru"}, {}], ids=str)
@pytest.mark.parametrize("name", ["resets", "mask"])
def test_flags_that_do_not_fit_are_refused_by_name(name, options):
    backbone, x = Backbone(WIDTH, 1, **options), torch.zeros(4, 7, WIDTH)
    for flags in (torch.zeros(4, 7), torch.zeros(4, 9).bool(), np.zeros((4, 7), bool)):
        with pytest.raises(ValueError, match=rf"{name} must be bool of \(4, 7\)"):
            backbone(x, **{name: flags})
    backbone.batch_first = False
    with pytest.raises(ValueError, match=rf"{name} must be bool of \(4, 7\)"):
        backbone(x, **{name: torch.zeros(7, 4).bool()})


def test_a_packed_sequence_is_refused():
    with pytest.raises(TypeError, match="takes no PackedSequence: pad it"):
        Backbone(WIDTH)(pack_sequence([torch.zeros(3, WIDTH)]))


ours = pytest.mark.parametrize("kind", ["mingru", "minlstm", "mingru-convolution"])


def make_single(kind):
    """Return a backbone in float32, and an input with all that may be passed with it."""
    x, resets, mask = make_inputs()
    backbone = make(kind).float()
    state = tuple(part.detach() for part in backbone.initial_state(3))
    return backbone, x.float(), {"state": state, "resets": resets, "mask": mask}


# Not PyTorch's GRU and LSTM, which Dynamo leaves alone.
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"gru", "lstm", "zero-initial-state"}))
def test_compiled_and_copied_ones_compute_the_same(kind):
    torch.compiler.reset()
    backbone, x, arguments = make_single(kind)
    if kind == "transformer":  # some of its state counts
        arguments["state"] = None
    expected = backbone(x, **arguments)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, **arguments), expected)
    torch.testing.assert_close(copy.deepcopy(backbone)(x, **arguments), expected)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"transformer"}))  # it keeps its tokens
def test_under_autocast_the_state_stays_in_single_precision(kind):
    backbone, x, arguments = make_single(kind)
    expected, _ = backbone(x, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = backbone(x, **arguments)
    torch.testing.assert_close(output, expected, atol=0.1, rtol=0.1)
    if kind != "mamba":  # it keeps some of its inputs, as narrow as autocast made them
        assert {part.dtype for part in state} <= {torch.float32}
    backbone(x, state=state)  # taken without autocast, too


@every_backbone
def test_all_of_a_backbone_is_made_where_and_in_which_type_it_is_wanted(kind):
    backbone = Backbone(WIDTH, 2, **KINDS[kind], device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in backbone.parameters()} == {("meta", torch.float64)}
    backbone = Backbone(WIDTH, 2, **KINDS[kind], dtype=torch.float64)
    assert backbone(make_inputs()[0])[0].dtype == torch.float64


def test_unknown_backbones_and_states_of_others_are_refused():
    with pytest.raises(ValueError, match=r"backbone must be one of mingru.*not 'foo'"):
        Backbone(8, backbone="foo")
    with pytest.raises(ValueError, match="num_layers must be at least 1, not 0"):
        Backbone(8, 0)
    for layers, others in ((2, 4), (4, 2)):
        state = Backbone(8, num_layers=others).initial_state(2)
        with pytest.raises(ValueError, match=r"Expected a state of shapes \[\(2, 8\).*, got \[\("):
            Backbone(8, num_layers=layers)(torch.zeros(2, 3, 8), state)


@every_backbone
def test_states_of_other_batches_and_masks_of_other_shapes_are_refused(kind):
    backbone, x = make(kind), make_inputs()[0]
    state = backbone.initial_state(len(x))
    if state:
        for wrong in (backbone.initial_state(len(x) + 1), state[:-1]):
            with pytest.raises(ValueError, match="Expected a state of shapes"):
                backbone(x, wrong)
            with pytest.raises(ValueError, match="Expected a state of shapes"):
                backbone.step(x[:, 0], wrong)
            with pytest.raises(ValueError, match=r"Expected a state of shapes|mask must be bool"):
                backbone.reset_state(wrong, torch.ones(len(x), dtype=torch.bool))
        for mask in (torch.ones(1) == 1, torch.ones(len(x)), torch.ones(len(x), 1) == 1, [True]):
            with pytest.raises(ValueError, match=rf"mask must be bool of \({len(x)},\), not "):
                backbone.reset_state(state, mask)


def test_a_backbone_says_what_wrappers_ask_a_recurrent_layer():
    backbone = Backbone(WIDTH, 2)
    assert (backbone.input_size, backbone.hidden_size, backbone.num_layers) == (WIDTH, WIDTH, 2)
    assert backbone.batch_first
    backbone.flatten_parameters()


@every_backbone
def test_first_states_are_made_where_and_in_which_type_they_are_wanted(kind):
    backbone = make(kind)
    for part, usual in zip(
        backbone.initial_state(2, "meta", torch.float16), backbone.initial_state(2), strict=True
    ):
        assert (part.device.type, part.shape) == ("meta", usual.shape)
        assert part.dtype == (torch.float16 if usual.is_floating_point() else usual.dtype)


@every_backbone
def test_what_is_saved_computes_the_same(kind):
    backbone, x = make(kind), make_inputs()[0]
    expected, _ = backbone(x)
    other = Backbone(WIDTH, 2, **KINDS[kind]).double().eval()
    other.load_state_dict(backbone.state_dict())
    for copied in (other, pickle.loads(pickle.dumps(backbone))):  # noqa: S301 - our own
        assert torch.equal(copied(x)[0], expected)


def test_options_of_a_mixer_that_there_is_not_are_refused():
    with pytest.raises(TypeError, match="mlp has no mixer to give memory to"):
        Backbone(16, 2, "mlp", memory=100)


def test_a_transformer_is_told_how_far_to_look_back():
    with pytest.raises(TypeError, match="a transformer needs context=, how many tokens"):
        Backbone(16, 2, "transformer")
