import math

import pytest
import torch

from minrl.agents.backbones.dropout import KERNELS, Dropout
from minrl.agents.backbones.native import load_kernels


@pytest.fixture(params=["compiled", "plain"])
def implementation(request, monkeypatch):
    """The kernel, and what stands in for it where it cannot be compiled."""
    monkeypatch.setenv("MINRL_NATIVE", "1" if request.param == "compiled" else "0")
    load_kernels.cache_clear()
    assert (load_kernels(KERNELS) is not None) == (request.param == "compiled")
    yield
    load_kernels.cache_clear()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_each_element_is_dropped_with_the_chance_asked_for(implementation, p):
    torch.manual_seed(0)
    x = torch.full((512, 1024), 3.0)
    y = Dropout(p)(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 3 / (1 - p)))
    spread = math.sqrt(p * (1 - p))
    assert abs(kept.double().mean() - (1 - p)) < 5 * spread / math.sqrt(x.numel())
    for axis, others in ((0, 512), (1, 1024)):  # no row and no column differs from the others
        chances = kept.double().mean(axis)
        assert (chances - (1 - p)).abs().max() < 6 * spread / math.sqrt(others)


def test_elements_are_dropped_independently_of_each_other_and_of_the_call_before(implementation):
    torch.manual_seed(0)
    dropout, ones = Dropout(0.1), torch.ones(1 << 20)
    one, two = ((dropout(ones) > 0).double() - 0.9 for _ in range(2))
    limit = 5 * 0.09 / math.sqrt(len(ones))
    assert abs((one * two).mean()) < limit
    for distance in (1, 2, 3, 4, 8, 64, 128, 1024, 7680):
        assert abs((one[distance:] * one[:-distance]).mean()) < limit


def test_the_gradient_goes_where_the_values_went(implementation):
    x = torch.randn(7, 13, 5, requires_grad=True)
    y = Dropout(0.3)(x.transpose(0, 1))
    weights = torch.randn(y.shape)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    expected = torch.where(y != 0, weights / 0.7, 0.0).transpose(0, 1)
    torch.testing.assert_close(gradient, expected)


def test_what_is_dropped_follows_from_the_seed_and_not_from_the_threads(implementation):
    x, dropout = torch.randn(600, 1000), Dropout(0.2)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            torch.manual_seed(5)
            results.append((dropout(x), dropout(x)))
    finally:
        torch.set_num_threads(threads)
    for first, second in results[1:]:
        assert torch.equal(first, results[0][0])
        assert torch.equal(second, results[0][1])
    assert not torch.equal(*results[0])


def test_nothing_is_dropped_when_not_training_or_with_no_chance():
    x = torch.randn(5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_the_default_type_of_new_tensors_changes_nothing(implementation):
    x, results = torch.ones(1000), []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            results.append(Dropout(0.1)(x))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(result, results[0]) for result in results)


def test_everything_may_be_dropped_or_nearly(implementation):
    x = torch.ones(1000)
    assert not Dropout(1.0)(x).any()
    assert not Dropout(1 - 1e-11)(x).any()


@pytest.mark.parametrize("p", [1.5, -0.1])
def test_what_is_no_chance_is_refused_as_pytorch_does(p):
    for dropout in (Dropout, torch.nn.Dropout):
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            dropout(p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_dropped_too(dtype):
    y = Dropout(0.5)(torch.ones(1000, dtype=dtype))
    assert y.dtype == dtype
    assert set(y.tolist()) == {0.0, 2.0}


def test_it_is_a_sound_operator_that_compiles(implementation):
    x, key = torch.randn(4, 6, requires_grad=True), torch.tensor([123456789012345])
    torch.library.opcheck(torch.ops.minrl.dropout.default, (x, key, 0.3))
    dropout = Dropout(0.3)
    compiled = torch.compile(dropout, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y[y != 0], x[y != 0] / 0.7)
