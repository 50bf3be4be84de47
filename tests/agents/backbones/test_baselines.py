import pytest
import torch
from torch import nn

from minrl.agents.backbones.baselines import GilrLSTMMixer, TorchMixer

B, T, D = 3, 12, 5


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    resets = torch.rand(B, T, generator=generator) < 0.2
    mask = torch.rand(B, T, generator=generator) < 0.7
    return x, resets, mask


def randomize(mixer):
    torch.manual_seed(1)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
def test_each_sequence_is_what_pytorch_makes_of_it_alone(cell):
    mixer = randomize(TorchMixer(cell, D, expansion=2))
    x, resets, mask = make_inputs()
    y, state = mixer(x, resets=resets, mask=mask)
    for row in range(B):
        valid = mask[row].nonzero().squeeze(1)
        starts = [i for i, step in enumerate(valid) if i == 0 or resets[row, step]]
        for start, stop in zip(starts, [*starts[1:], len(valid)], strict=True):
            steps = valid[start:stop]
            first = tuple(part[:1].unsqueeze(0) for part in mixer.initial_state(1))
            hidden, last = mixer.cell(
                x[row, steps].unsqueeze(0), first if len(first) > 1 else first[0]
            )
            torch.testing.assert_close(y[row, steps], mixer.output(hidden)[0])
        for got, expected in zip(state, last if len(state) > 1 else [last], strict=True):
            torch.testing.assert_close(got[row], expected[0, 0])


def loop_gilr_lstm(mixer, x, resets, mask):
    """The equations of arXiv 1709.04057, one step of one sequence after the other."""
    gate, candidate = mixer.surrogate.weight_ih_l0.chunk(2)
    gate_bias, candidate_bias = mixer.surrogate.bias_ih_l0.chunk(2)
    weights = mixer.cell.weight_ih_l0.chunk(3)
    biases = mixer.cell.bias_ih_l0.chunk(3)
    outputs, last = [], []
    for row in range(x.shape[0]):
        first = [part[0] for part in mixer.initial_state(1)]
        s, c = first
        for step in range(x.shape[1]):
            if mask[row, step]:
                if resets[row, step]:
                    s, c = first
                token = x[row, step]
                seen = torch.cat([token, s])
                z = torch.sigmoid(gate @ token + gate_bias)
                s = (1 - z) * s + z * torch.tanh(candidate @ token + candidate_bias)
                f, i, g = (w @ seen + b for w, b in zip(weights, biases, strict=True))
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(mixer.output_gate(seen)) * c
                outputs.append(mixer.output(h))
        last.append((s, c))
    return torch.stack(outputs), [torch.stack(part) for part in zip(*last, strict=True)]


def test_gilr_lstm_is_a_loop_over_its_equations():
    mixer = randomize(GilrLSTMMixer(D, expansion=2))
    x, resets, mask = make_inputs()
    y, state = mixer(x, resets=resets, mask=mask)
    expected, last = loop_gilr_lstm(mixer, x, resets, mask)
    torch.testing.assert_close(y[mask], expected)
    for got, wanted in zip(state, last, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    "make",
    [
        lambda learn: TorchMixer(nn.LSTM, D, learn_initial_state=learn),
        lambda learn: GilrLSTMMixer(D, learn_initial_state=learn),
    ],
)
def test_the_initial_state_is_learned_or_zero(make):
    learned, zero = make(True), make(False)
    for part in zero.initial_state(2):
        assert part.count_nonzero() == 0
        assert not part.requires_grad
    x = make_inputs()[0].float()
    learned(x)[0].square().sum().backward()
    initial = [parameter for name, parameter in learned.named_parameters() if "bias_h0" in name]
    assert initial
    assert all(parameter.grad.count_nonzero() for parameter in initial)
