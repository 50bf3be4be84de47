import pytest
import torch

from minrl.agents.backbones import selective_scan as module
from minrl.agents.backbones.selective_scan import selective_scan

NAMES = ("x", "delta", "rates", "enter", "read", "initial_state")


@pytest.fixture(params=["native float32", "gates float32", "gates float64"])
def dtype(request, monkeypatch):
    """Run a test on every implementation: the compiled kernels, and the scan on two types."""
    if "gates" in request.param:
        monkeypatch.setattr(module, "_is_native", lambda *_: False)
    else:
        assert module._is_native(torch.ones(1), torch.ones(1))
    return torch.float64 if "64" in request.param else torch.float32


def make_inputs(batch=3, length=17, width=19, size=5, flags=True, steps=(1e-3, 3.0)):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = torch.rand(batch, length, width, generator=generator, dtype=torch.float64)
    shortest, longest = torch.tensor(steps, dtype=torch.float64).log()
    values = (
        draw(batch, length, width),
        (shortest + (longest - shortest) * spread).exp(),
        draw(size, width).exp(),
        draw(batch, length, size),
        draw(batch, length, size),
        draw(batch, size, width),
    )
    resets = torch.rand(batch, length, generator=generator) < 0.2 if flags else None
    mask = torch.rand(batch, length, generator=generator) < 0.7 if flags else None
    return dict(zip(NAMES, values, strict=True)), {"resets": resets, "mask": mask}


def loop(x, delta, rates, enter, read, initial_state, *, resets=None, mask=None):
    """Take one step of one sequence after another, straight from the equations."""
    outputs, ends = [], []
    for row in range(len(x)):
        state = initial_state[row]
        for t in range(x.shape[1]):
            output = torch.zeros_like(x[row, t])
            if mask is None or mask[row, t]:
                if resets is not None and resets[row, t]:
                    state = torch.zeros_like(state)
                kept = torch.exp(-delta[row, t] * rates) * state
                state = kept + torch.outer(enter[row, t], delta[row, t] * x[row, t])
                output = read[row, t] @ state
            outputs.append(output)
        ends.append(state)
    return torch.stack(outputs).view_as(x), torch.stack(ends)


def gradient_of(leaf):
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def run_with_gradients(function, tensors, flags, dtype=torch.float64):
    """Return outputs, where valid, and the gradients of a loss that weighs all of them."""
    leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in tensors.items()}
    y, last = function(*leaves.values(), **flags)
    if flags["mask"] is not None:
        y = y.masked_fill(~flags["mask"].unsqueeze(-1), 0.0)
    generator = torch.Generator().manual_seed(1)
    (
        (y * torch.randn(y.shape, generator=generator, dtype=torch.float64)).sum()
        + (last * torch.randn(last.shape, generator=generator, dtype=torch.float64)).sum()
    ).backward()
    grads = {name: gradient_of(leaf) for name, leaf in leaves.items()}
    return {"y": y.detach(), "last": last.detach()} | grads


def assert_equal(got, expected, dtype):
    for name, value in expected.items():
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        scale = value.abs().max().item()
        torch.testing.assert_close(
            got[name].double(), value, atol=tolerance * scale, rtol=0, msg=lambda m, n=name: n + m
        )


@pytest.mark.parametrize("flags", [True, False], ids=["resets and mask", "plain"])
@pytest.mark.parametrize(
    "sizes", [(3, 17, 19, 5), (2, 1, 4, 1), (1, 40, 64, 16)], ids=["odd", "one step", "as in use"]
)
def test_outputs_and_gradients_are_those_of_a_loop(dtype, sizes, flags):
    tensors, options = make_inputs(*sizes, flags=flags)
    expected = run_with_gradients(loop, tensors, options)
    assert_equal(run_with_gradients(selective_scan, tensors, options, dtype), expected, dtype)


@pytest.mark.parametrize("steps", [(1e-40, 1e-12), (1e-9, 1e-3), (10.0, 300.0)])
def test_steps_of_any_length_have_finite_gradients_that_are_right(dtype, steps):
    tensors, options = make_inputs(steps=steps, flags=False)
    expected = run_with_gradients(loop, tensors, options)
    assert_equal(run_with_gradients(selective_scan, tensors, options, dtype), expected, dtype)


def second_derivatives(function, tensors, flags, dtype=torch.float64):
    """Return the gradients of the sum of squares of the gradients."""
    leaves = {name: value.to(dtype, copy=True).requires_grad_() for name, value in tensors.items()}
    y, last = function(*leaves.values(), **flags)
    loss = y[flags["mask"]].square().sum() + last.sin().sum()
    first = torch.autograd.grad(loss, leaves.values(), create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves.values())
    return dict(zip(leaves, second, strict=True))


def test_second_derivatives_are_those_of_a_loop():
    tensors, options = make_inputs(2, 7, 3, 2)
    expected = second_derivatives(loop, tensors, options)
    for dtype in (torch.float32, torch.float64):
        got = second_derivatives(selective_scan, tensors, options, dtype)
        assert_equal(got, expected, dtype)


def test_without_an_initial_state_it_is_zero(dtype):
    tensors, options = make_inputs()
    *rest, initial = (value.to(dtype) for value in tensors.values())
    given = selective_scan(*rest, torch.zeros_like(initial), **options)
    for got, expected in zip(selective_scan(*rest, **options), given, strict=True):
        assert torch.equal(got, expected)


def test_every_number_of_threads_gives_the_same(monkeypatch):
    tensors, options = make_inputs(batch=5)
    monkeypatch.setattr(module, "WORTH_A_THREAD", 1)
    alone = run_with_gradients(selective_scan, tensors, options, torch.float32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = run_with_gradients(selective_scan, tensors, options, torch.float32)
    for name, value in alone.items():
        assert torch.equal(together[name], value)


@pytest.mark.parametrize("output", [0, 1])
def test_the_last_state_alone_or_the_outputs_alone_can_be_differentiated(dtype, output):
    tensors, _ = make_inputs(flags=False)
    grads = []
    for function, kind in ((loop, torch.float64), (selective_scan, dtype)):
        leaves = {name: x.to(kind, copy=True).requires_grad_() for name, x in tensors.items()}
        function(*leaves.values())[output].square().sum().backward()
        grads.append({name: gradient_of(leaf) for name, leaf in leaves.items()})
    assert_equal(grads[1], grads[0], dtype)


def test_inputs_that_are_views_are_read_right(dtype):
    tensors, options = make_inputs()
    expected = run_with_gradients(loop, tensors, options)
    views = {name: value.flip(0).flip(0).mT.contiguous().mT for name, value in tensors.items()}
    flags = {name: flag.t().contiguous().t() for name, flag in options.items()}
    assert_equal(run_with_gradients(selective_scan, views, flags, dtype), expected, dtype)


def test_half_precision_is_computed_in_single():
    tensors, options = make_inputs()
    halves = [value.bfloat16() for value in tensors.values()]
    expected, _ = selective_scan(*(half.float() for half in halves), **options)
    y, last = selective_scan(*halves, **options)
    assert y.dtype == last.dtype == torch.float32
    assert torch.equal(y, expected)


def test_the_operator_keeps_the_rules_of_torch_operators():
    tensors, options = make_inputs(batch=2, length=4, width=3, size=2)
    given = [value.float().requires_grad_() for value in tensors.values()]
    torch.library.opcheck(
        torch.ops.minrl.selective_scan.default, (*given, options["resets"], options["mask"])
    )


@pytest.mark.parametrize("name", [*NAMES[1:], "resets", "mask"])
def test_sizes_that_do_not_fit_are_refused(name):
    tensors, options = make_inputs()
    given = tensors | options
    given[name] = given[name][..., 1:]
    with pytest.raises(ValueError, match=name):
        selective_scan(**given)


@pytest.mark.parametrize("name", ["delta", "rates", "enter", "read"])
def test_tensors_on_another_device_are_refused(name):
    tensors, options = make_inputs()
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta, x on cpu"):
        selective_scan(**tensors, **options)


def scan_by_the_convention_of_mamba_ssm(u, delta, A, B, C, *, return_last_state):  # noqa: N803
    """``selective_scan_fn`` by its docstring: u, delta (B D L), A (D N), B, C (B N L)."""
    assert return_last_state
    state = u.new_zeros(*u.shape[:2], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        state = torch.exp(step * A) * state + step * B[:, None, :, t] * u[:, :, t, None]
        outputs.append((state * C[:, None, :, t]).sum(2))
    return torch.stack(outputs, 2), state


def test_mamba_ssm_is_called_by_its_convention(monkeypatch):
    """It needs a GPU: what it would be given is put through a loop in its axes and signs."""
    monkeypatch.setattr(module, "_mamba_ssm", lambda: scan_by_the_convention_of_mamba_ssm)
    x, delta, rates, enter, read = (torch.rand(3, 17, n) + 0.1 for n in (5, 5, 5, 4, 4))
    rates = rates[0, :4]
    expected = selective_scan(x, delta, rates, enter, read)
    got = module._scan_by_mamba_ssm(x, delta, rates, enter, read)
    for ours, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
