import pytest
import torch
from torch.nn import functional

from minrl.agents.backbones.convolution import DepthwiseConvolution

WIDTH, LENGTH, BATCH = 5, 14, 3


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    resets = torch.rand(BATCH, LENGTH, generator=generator) < 0.2
    mask = torch.rand(BATCH, LENGTH, generator=generator) < 0.7
    return x, resets, mask


def convolve_sequences(layer, x, resets, mask):
    """Cut rows into their sequences of valid steps; convolve each, padded, as PyTorch does."""
    y = torch.zeros_like(x)
    for row in range(len(x)):
        valid = mask[row].nonzero().flatten()
        number = resets[row, valid].cumsum(0)
        for sequence in number.unique():
            steps = valid[number == sequence]
            padded = functional.pad(x[row, steps].T, (layer.past, 0))
            y[row, steps] = functional.conv1d(padded, layer.weight, layer.bias, groups=WIDTH).T
    return y


@pytest.mark.parametrize("kernel_size", [1, 2, 4, 20])
@pytest.mark.parametrize("with_flags", [True, False])
@pytest.mark.parametrize("cuts", [(), (1, 6, 7), range(1, LENGTH)])
def test_split_anywhere_it_is_pytorchs_on_every_sequence(kernel_size, with_flags, cuts):
    layer = DepthwiseConvolution(WIDTH, kernel_size).double()
    x, resets, mask = make_inputs()
    if not with_flags:
        resets, mask = resets & False, mask | True
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, LENGTH), strict=True):
        part = slice(start, stop)
        flags = {"resets": resets[:, part], "mask": mask[:, part]} if with_flags else {}
        y, state = layer(x[:, part], state, **flags)
        parts.append(y)
    expected = convolve_sequences(layer, x, resets, mask)
    torch.testing.assert_close(torch.cat(parts, 1)[mask], expected[mask], atol=1e-12, rtol=0)
