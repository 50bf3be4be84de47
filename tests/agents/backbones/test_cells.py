import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from minrl import Backbone, MinGRU, MinLSTM
from minrl.agents.backbones.dropout import dropout

CELLS = {
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "minlstm-unnormalised": lambda *args, **kwargs: MinLSTM(*args, normalize=False, **kwargs),
}
both = pytest.mark.parametrize("make", CELLS.values(), ids=CELLS)


def g(x):
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def recurrence(cell, x):
    """The paper's equations, one step after another, for one layer: x (T, F) -> (T, H)."""
    rows = (x @ cell.weight_ih_l0.T + cell.bias_ih_l0).split(cell.hidden_size, dim=-1)
    h, states = torch.zeros(cell.hidden_size, dtype=x.dtype), []
    for t in range(len(x)):
        if isinstance(cell, MinGRU):
            z, c = torch.sigmoid(rows[0][t]), g(rows[1][t])
            h = (1 - z) * h + z * c
        else:
            f, i, c = torch.sigmoid(rows[0][t]), torch.sigmoid(rows[1][t]), g(rows[2][t])
            if cell.normalize:
                f, i = f / (f + i), i / (f + i)
            h = f * h + i * c
        states.append(h)
    return torch.stack(states)


@both
def test_forward_is_the_papers_recurrence(make):
    cell = make(3, 5).double()
    x = torch.randn(40, 3, dtype=torch.float64)
    output, h_n = cell(x)
    torch.testing.assert_close(output, recurrence(cell, x))
    torch.testing.assert_close(h_n[0], output[-1])


@both
def test_in_training_what_goes_from_layer_to_layer_is_dropped(make):
    cell, x = make(8, 8, 2, dropout=0.5), torch.randn(30, 4, 8)
    layers = [make(8, 8), make(8, 8)]
    for index, layer in enumerate(layers):
        for name, parameter in layer.named_parameters():
            parameter.data = cell.get_parameter(name.replace("l0", f"l{index}")).data
    torch.manual_seed(7)
    expected, _ = layers[1](dropout(layers[0](x)[0], 0.5, training=True))
    torch.manual_seed(7)
    torch.testing.assert_close(cell(x)[0], expected)
    torch.testing.assert_close(cell.eval()(x)[0], layers[1](layers[0](x)[0])[0])


@both
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_parallel_equals_step_with_resets(make, batch_first, learned):
    cell = make(3, 5, 2, batch_first=batch_first, learn_initial_state=learned)
    if learned:
        nn.init.normal_(cell.bias_h0)
    x = torch.randn(4, 30, 3)  # B T F
    resets = torch.rand(4, 30) < 0.2
    moved = (lambda y: y) if batch_first else (lambda y: y.transpose(0, 1))
    output, h_n = cell(moved(x), resets=moved(resets))
    h, steps = None, []
    for t in range(30):
        y, h = cell.step(x[:, t], h, resets[:, t])
        steps.append(y)
    torch.testing.assert_close(moved(output), torch.stack(steps, 1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(h_n, h, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["resets", "mask"])
@pytest.mark.parametrize("shape", [(7, 3), (7,)], ids=["batch", "unbatched"])
def test_flags_that_are_not_bool_or_misshapen_are_named(name, shape):
    cell, x = MinGRU(2, 4), torch.randn(*shape, 2)
    for wrong in (torch.ones(shape), torch.ones(5, dtype=torch.bool), [True] * 7):
        with pytest.raises(ValueError, match=rf"{name} must be bool of \({shape[0]},"):
            cell(x, **{name: wrong})


@both
def test_mask_freezes_the_state_and_hides_nan(make):
    cell = make(3, 5, batch_first=True)
    x = torch.randn(2, 9, 3)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    mask[0, 3] = False
    poisoned = x.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    output, h_n = cell(poisoned, mask=mask)
    (output * mask.unsqueeze(-1)).sum().backward()
    shorter, _ = cell(x[1:, :4])
    torch.testing.assert_close(h_n[0, 1], shorter[0, -1])
    torch.testing.assert_close(output[0, 3], output[0, 2])
    assert poisoned.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())


@both
def test_packed_input_needs_no_default_device(make):
    cell, packed = make(3, 5), pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    expected, _ = cell(packed)
    h0 = torch.zeros(1, 2, 5)
    with torch.device("meta"):  # stands for "cuda"
        got, _ = cell(packed, h0)
    assert torch.equal(got.data, expected.data)


@both
def test_packed_equals_padded(make):
    cell = make(3, 5)
    rows = [torch.randn(length, 3) for length in (4, 7, 4)]
    packed, h_n = cell(pack_sequence(rows, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(packed)
    assert lengths.tolist() == [4, 7, 4]
    for index, row in enumerate(rows):
        expected, last = cell(row)
        torch.testing.assert_close(padded[: len(row), index], expected)
        torch.testing.assert_close(h_n[:, index], last)


def test_forget_bias_is_in_the_forget_rows_only():
    torch.manual_seed(0)
    with_bias = MinLSTM(3, 5, 2, forget_bias=3.0)
    torch.manual_seed(0)
    without = MinLSTM(3, 5, 2, forget_bias=0.0)
    for name, value in with_bias.state_dict().items():
        difference = value - without.state_dict()[name]
        if name.startswith("bias"):
            torch.testing.assert_close(difference, torch.tensor([3.0] * 5 + [0.0] * 10))
        else:
            assert (difference == 0).all()


def test_half_precision_keeps_the_state_in_float32():
    cell = MinGRU(3, 5, batch_first=True).to(torch.bfloat16)
    x = torch.randn(2, 50, 3, dtype=torch.bfloat16)
    output, h_n = cell(x)
    first, h = cell(x[:, :20])
    second, h = cell(x[:, 20:], h)
    assert output.dtype is torch.bfloat16
    assert h_n.dtype is torch.float32
    # The projections of 20 and of 50 steps may round differently, by one bfloat16 step of theirs:
    # they are below 2, the states may be much smaller.
    torch.testing.assert_close(torch.cat([first, second], 1), output, atol=2**-7, rtol=2**-7)
    torch.testing.assert_close(h, h_n, atol=2**-7, rtol=0)


def gradients_of(function, cell, x, resets):
    """Return the output and all gradients of one training step."""
    output, h_n = function(x, resets=resets)
    loss = output.float().square().sum() + h_n.sum()
    gradients = torch.autograd.grad(loss, list(cell.parameters()))
    return [output, h_n, *gradients]


# inductor needs a C++ compiler and half a minute, and PyTorch warns of itself
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@both
def test_compiles_into_one_graph(make, dynamic, backend):
    torch.compiler.reset()
    cell = make(3, 6, num_layers=2, learn_initial_state=True)
    compiled = torch.compile(cell, fullgraph=True, backend=backend, dynamic=dynamic)
    for length in (7, 12):
        x, resets = torch.randn(length, 2, 3), torch.rand(length, 2) < 0.2
        expected = gradients_of(cell, cell, x, resets)
        torch.testing.assert_close(gradients_of(compiled, cell, x, resets), expected)


@both
def test_a_step_exports_to_plain_operations_with_any_batch(make):
    cell = make(3, 6, batch_first=True)

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def forward(self, x, h, reset):
            return self.cell.step(x, h, reset)

    batch = torch.export.Dim("batch", min=1, max=1024)
    shapes = ({0: batch}, {1: batch}, {0: batch})
    example = (torch.randn(2, 3), torch.rand(1, 2, 6), torch.tensor([True, False]))
    program = torch.export.export(Step(), example, dynamic_shapes=shapes)
    assert "minrl" not in str(program.graph)
    for size in (1, 5):
        inputs = torch.randn(size, 3), torch.rand(1, size, 6), torch.rand(size) < 0.5
        torch.testing.assert_close(program.module()(*inputs), cell.step(*inputs))


@both
def test_whole_sequences_export_with_the_operator_in_them(make):
    cell = make(3, 6, batch_first=True)
    program = torch.export.export(cell, (torch.randn(2, 9, 3),))
    assert "minrl.gated_scan" in str(program.graph)
    x = torch.randn(2, 9, 3)
    torch.testing.assert_close(program.module()(x), cell(x))


@both
def test_autocast_trains_with_a_float32_state(make):
    cell = make(16, 16, batch_first=True)
    x, resets = torch.randn(4, 30, 16), torch.rand(4, 30) < 0.1
    expected = gradients_of(cell, cell, x, resets)
    with torch.autocast("cpu", torch.bfloat16):
        output, h_n, *gradients = gradients_of(cell, cell, x, resets)
    assert output.dtype is torch.bfloat16
    assert h_n.dtype is torch.float32
    for got, right in zip([output, h_n, *gradients], expected, strict=True):
        assert (got - right).norm() / right.norm() < 0.05


@both
def test_memory_spreads_what_the_channels_remember(make):
    """With no input, an impulse in the state decays by 1 - 1/T a step, T from 2 to ``memory``."""
    cell = make(3, 6, candidate="identity", memory=200)
    for name, parameter in cell.named_parameters():  # as ppo_atari_lstm.py of CleanRL does
        if "bias" in name:
            nn.init.constant_(parameter, 0)
        elif "weight" in name:
            nn.init.orthogonal_(parameter, 1.0)
    cell.reset_parameters()
    with torch.no_grad():
        cell.bias_ih_l0[-6:] = 0  # nothing enters
    output, _ = cell(torch.zeros(40, 3), torch.ones(1, 6))
    steps = torch.tensor([200.0]) ** torch.linspace(0, 1, 6) * 2 ** torch.linspace(1, 0, 6)
    torch.testing.assert_close(output[0], 1 - 1 / steps)
    torch.testing.assert_close(output[39], (1 - 1 / steps) ** 40, rtol=1e-4, atol=1e-6)


@both
def test_with_memory_some_channels_have_gates_that_open_easily(make):
    """Their logits spread by up to one and a half times what holds them, however long T is."""
    cell = make(400, 400, 2, memory=1000)
    gates = len(cell.bias_ih_l0) // 400 - 1
    for weight, bias in cell.all_weights:
        logits = torch.randn(2000, 400) @ weight[: gates * 400].T
        spread = (logits.std(0) / bias[: gates * 400].abs()).view(gates, 400)[:, 200:]
        assert spread.max().item() == pytest.approx(1.5, abs=0.15)
        assert spread.mean().item() == pytest.approx(0.75, abs=0.15)
        torch.testing.assert_close(spread[0], spread[-1], rtol=0.3, atol=0)  # of a channel
        assert logits.std(0).min() > 0.5  # no less than without
        assert weight[-400:].abs().max() <= 1 / 20  # the candidate's


@both
def test_any_memory_and_device_can_be_asked_for(make):
    cell = make(4, 8, memory=1e300)
    assert all(parameter.isfinite().all() for parameter in cell.parameters())
    with torch.device("meta"):
        assert make(4, 8, memory=10, device="cpu").weight_ih_l0.device.type == "cpu"
        assert make(4, 8, memory=10).weight_ih_l0.is_meta


@both
@pytest.mark.parametrize(
    "wrong",
    [
        {"memory": 1},
        {"memory": math.inf},
        {"memory": math.nan},
        {"memory": 100, "bias": False},
    ],
    ids=str,
)
def test_memory_that_cannot_be_is_refused(make, wrong):
    with pytest.raises(ValueError, match="memory needs a bias"):
        make(3, 5, **wrong)


@both
def test_one_channel_alone_has_all_the_memory(make):
    cell = make(3, 1, candidate="identity", memory=200)
    with torch.no_grad():
        cell.bias_ih_l0[-1:] = 0
    output, _ = cell(torch.zeros(1, 3), torch.ones(1, 1))
    torch.testing.assert_close(output, torch.tensor([[1 - 1 / 200]]))


@both
def test_setting_rows_of_an_initial_state_leaves_the_parameter_alone(make):
    cell = make(3, 5, learn_initial_state=True)
    with torch.no_grad():
        cell.initial_state(4)[:, 1] = 7
        cell.initial_state(1).add_(7)
    assert (cell.bias_h0 == 0).all()
    cell.initial_state(4).sum().backward()
    assert (cell.bias_h0.grad == 4).all()


@both
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (np.zeros(2, bool), r"not ndarray of \(2,\)"),
        (torch.zeros(2), r"not torch.float32 of \(2,\); .bool\(\) makes it one"),
        (torch.zeros(3, dtype=torch.bool), r"not torch.bool of \(3,\)"),
        ([True, False], "not list"),
    ],
    ids=["array", "float", "size", "list"],
)
def test_flags_that_are_no_bool_tensor_are_named(make, flags, message):
    cell, x = make(3, 5), torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match=r"^reset must be bool of \(2,\), " + message):
        cell.step(x[0], reset=flags)
    with pytest.raises(ValueError, match=r"^reset must be bool of \(2,\), " + message):
        Backbone(8).step(torch.randn(2, 8), reset=flags)
    with pytest.raises(ValueError, match=r"resets must be bool of \(4, 2\), not "):
        cell(x, resets=flags)


@both
def test_a_step_of_one_row_or_of_a_whole_sequence_is_refused(make):
    for shape in ((8,), (2, 4, 8)):
        for core in (make(8, 5), Backbone(8)):
            with pytest.raises(ValueError, match=r"a step takes \(B, features\).*, not \("):
                core.step(torch.randn(shape))
