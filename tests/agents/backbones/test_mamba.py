import pytest
import torch

from minrl.agents.backbones import selective_scan
from minrl.agents.backbones.mamba import MambaMixer

WIDTH, LENGTH, BATCH = 8, 15, 3

# What mamba_ssm.Mamba(d_model=8, d_state=6, d_conv=3, expand=2, dt_rank=2) has in its state_dict.
OFFICIAL = {
    "A_log": (16, 6),
    "D": (16,),
    "in_proj.weight": (32, 8),
    "conv1d.weight": (16, 1, 3),
    "conv1d.bias": (16,),
    "x_proj.weight": (14, 16),
    "dt_proj.weight": (16, 2),
    "dt_proj.bias": (16,),
    "out_proj.weight": (8, 16),
}


@pytest.fixture(params=["native float32", "gates float32", "gates float64"])
def dtype(request, monkeypatch):
    if "gates" in request.param:
        monkeypatch.setattr(selective_scan, "_is_native", lambda *_: False)
    else:
        assert selective_scan._is_native(torch.ones(1), torch.ones(1))
    return torch.float64 if "64" in request.param else torch.float32


def make_mixer():
    torch.manual_seed(0)
    return MambaMixer(WIDTH, state_size=6, kernel_size=3, rank=2)


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    resets = torch.rand(BATCH, LENGTH, generator=generator) < 0.15
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.8
    return x, resets, mask


def run_loop(weights, sequence):
    """Mix one sequence, (T, D), token by token: algorithm 2 of arXiv 2312.00752."""
    inner, size = weights["A_log"].shape
    rank = weights["dt_proj.weight"].shape[1]
    taps = weights["conv1d.weight"].squeeze(1)  # E K
    past = [torch.zeros(inner, dtype=sequence.dtype)] * (taps.shape[1] - 1)
    state = torch.zeros(inner, size, dtype=sequence.dtype)
    outputs = []
    for token in sequence:
        both = weights["in_proj.weight"] @ token
        past = [*past, both[:inner]]
        window = torch.stack(past[-taps.shape[1] :], 1)
        x = (window * taps).sum(1) + weights["conv1d.bias"]
        x = x * torch.sigmoid(x)
        projected = weights["x_proj.weight"] @ x
        enter, read = projected[rank : rank + size], projected[rank + size :]
        delta = weights["dt_proj.weight"] @ projected[:rank] + weights["dt_proj.bias"]
        delta = torch.log1p(delta.exp()).unsqueeze(1)
        state = torch.exp(-delta * weights["A_log"].exp()) * state + delta * enter * x.unsqueeze(1)
        gate = both[inner:]
        y = (state @ read + weights["D"] * x) * gate * torch.sigmoid(gate)
        outputs.append(weights["out_proj.weight"] @ y)
    return torch.stack(outputs)


def run_loop_on_batch(weights, x, resets, mask):
    """Cut rows into their sequences of valid tokens, and mix each on its own."""
    y = torch.zeros_like(x)
    for row in range(len(x)):
        sequences = [[]]
        for t in range(x.shape[1]):
            if mask[row, t]:
                if resets[row, t]:
                    sequences.append([])
                sequences[-1].append(t)
        for steps in filter(None, sequences):
            index = torch.tensor(steps)
            y = y.index_put((torch.tensor(row), index), run_loop(weights, x[row, index]))
    return y


def gradients(y, mask, weights):
    scale = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    loss = (y.double() * scale)[mask].sum()
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


@pytest.mark.parametrize("cuts", [(), (1, 6, 7, 12)], ids=["whole", "split"])
def test_outputs_and_gradients_are_those_of_a_loop_over_tokens(dtype, cuts):
    mixer, (x, resets, mask) = make_mixer().to(dtype), make_inputs()
    weights = {k: v.detach().double().requires_grad_() for k, v in mixer.named_parameters()}
    expected = run_loop_on_batch(weights, x, resets, mask)
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        part = slice(start, stop)
        options = {"resets": resets[:, part], "mask": mask[:, part]}
        y, state = mixer(x[:, part].to(dtype), state, **options)
        parts.append(y)
    y = torch.cat(parts, 1)
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(y[mask].double(), expected[mask], atol=tolerance, rtol=0)
    wanted = gradients(expected, mask, weights)
    for name, got in gradients(y, mask, dict(mixer.named_parameters())).items():
        scale = wanted[name].abs().max().item()
        torch.testing.assert_close(got.double(), wanted[name], atol=tolerance * scale, rtol=0)


def test_acting_step_by_step_equals_the_whole_in_single_precision():
    mixer = make_mixer()
    x = make_inputs()[0].float()
    whole, last = mixer(x)
    state, steps = mixer.initial_state(BATCH), []
    for t in range(LENGTH):
        y, state = mixer(x[:, t : t + 1], state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=0)


def test_parameters_are_laid_out_as_those_of_the_released_code():
    mixer = make_mixer()
    assert {name: tuple(value.shape) for name, value in mixer.state_dict().items()} == OFFICIAL
    assert MambaMixer(64).rank == 4
    assert MambaMixer(65).rank == 5


def test_initial_values_are_those_of_the_released_code():
    mixer = MambaMixer(256)
    steps = torch.nn.functional.softplus(mixer.dt_proj.bias).log10()
    assert -3.001 <= steps.min() < -2.9
    assert -1.1 < steps.max() <= -0.999
    assert abs(steps.mean() + 2) < 0.1  # log-uniform
    assert abs(steps.std() - 2 / 12**0.5) < 0.1
    assert torch.equal(mixer.A_log.exp().round(), torch.arange(1.0, 17).expand(512, 16))
    assert (mixer.D == 1).all()
    assert 0.9 / 4 < mixer.dt_proj.weight.abs().max() <= 1 / 4  # rank ** -0.5


@torch.no_grad()
def test_an_exported_step_equals_the_mixer():
    mixer = make_mixer().eval()
    x = torch.randn(1, 1, WIDTH)
    state = tuple(torch.randn_like(part) for part in mixer.initial_state(1))
    program = torch.export.export(mixer, (x, state))
    assert not [n for n in program.graph.nodes if "minrl" in str(n.target)]
    torch.testing.assert_close(program.module()(x, state), mixer(x, state))
