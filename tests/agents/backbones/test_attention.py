import pytest
import torch

from minrl.agents.backbones.attention import AttentionMixer

WIDTH, LENGTH, BATCH = 8, 17, 3


def make_mixer(context=5, num_heads=1, dtype=torch.float64):
    torch.manual_seed(0)
    return AttentionMixer(WIDTH, context=context, num_heads=num_heads).to(dtype)


def make_inputs(length=LENGTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, length, WIDTH, generator=generator, dtype=torch.float64)
    resets = torch.rand(BATCH, length, generator=generator) < 0.15
    mask = torch.rand(BATCH, length, generator=generator) < 0.7
    return x, resets, mask


def attend_in_a_loop(mixer, x, resets, mask):
    """Let every valid token look back, token by token and head by head."""
    y = torch.zeros_like(x)
    for row in range(len(x)):
        sequence = []
        for t in range(x.shape[1]):
            if not mask[row, t]:
                continue
            if resets[row, t]:
                sequence = []
            sequence.append(t)
            window = x[row, sequence[-mixer.context :]]
            tokens = window @ mixer.projection.weight.T + mixer.projection.bias
            parts = tokens.view(len(window), 3, mixer.num_heads, -1)
            heads = []
            for head in range(mixer.num_heads):
                query, keys, values = parts[-1, 0, head], parts[:, 1, head], parts[:, 2, head]
                score = torch.exp(keys @ query / len(query) ** 0.5)
                heads.append(score @ values / score.sum())
            output = mixer.output.weight @ torch.cat(heads) + mixer.output.bias
            y = y.index_put((torch.tensor(row), torch.tensor(t)), output)
    return y


def gradients(mixer, y, mask):
    scale = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad((y * scale)[mask].sum(), list(mixer.parameters()))


def run_in_parts(mixer, x, cuts, **flags):
    state, parts = None, []
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        part = slice(start, stop)
        now = {name: None if flag is None else flag[:, part] for name, flag in flags.items()}
        y, state = mixer(x[:, part], state, **now)
        parts.append(y)
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("cuts", [(), (1, 6, 7, 12), range(1, LENGTH)])
@pytest.mark.parametrize("with_mask", [True, False])
@pytest.mark.parametrize("with_resets", [True, False])
@pytest.mark.parametrize(("context", "num_heads"), [(5, 1), (1, 2), (LENGTH, 2), (40, 1)])
def test_outputs_and_gradients_are_those_of_a_loop(
    context, num_heads, with_resets, with_mask, cuts
):
    mixer = make_mixer(context, num_heads)
    x, resets, mask = make_inputs()
    mask, resets = mask if with_mask else mask | True, resets & with_resets
    expected = attend_in_a_loop(mixer, x, resets, mask)
    flags = {"resets": resets if with_resets else None, "mask": mask if with_mask else None}
    y, _ = run_in_parts(mixer, x, cuts, **flags)
    torch.testing.assert_close(y[mask], expected[mask], atol=1e-12, rtol=0)
    wanted = gradients(mixer, expected, mask)
    for got, grad in zip(gradients(mixer, y, mask), wanted, strict=True):
        torch.testing.assert_close(got, grad, atol=1e-11, rtol=0)


@pytest.mark.parametrize("context", [1, 2, 5, 30])
def test_the_state_is_the_same_however_the_sequence_was_split(context):
    mixer = make_mixer(context)
    for seed in range(5):
        x, resets, mask = make_inputs(seed=seed)
        _, whole = mixer(x, mixer.initial_state(BATCH), resets=resets, mask=mask)
        for cuts in ((), (4,), (1, 2, 11), range(1, LENGTH)):
            _, state = run_in_parts(mixer, x, cuts, resets=resets, mask=mask)
            torch.testing.assert_close(state, whole, atol=1e-12, rtol=0)


def test_a_token_sees_exactly_the_last_of_its_context():
    mixer = make_mixer(context=5)
    x = make_inputs()[0].requires_grad_()
    for state in (None, mixer.initial_state(BATCH)):
        y, _ = mixer(x, state)
        (grad,) = torch.autograd.grad(y[:, 12].sum(), x, retain_graph=True)
        seen = grad.abs().sum((0, 2)) > 0
        assert seen.nonzero().flatten().tolist() == [8, 9, 10, 11, 12]


def test_the_state_is_of_floating_point_and_never_grows():
    mixer = make_mixer(context=4)
    state = mixer.initial_state(BATCH)
    shapes = [part.shape for part in state]
    x = make_inputs()[0]
    for t in range(LENGTH):
        _, state = mixer(x[:, t : t + 1], state)
        assert [part.shape for part in state] == shapes
        assert all(part.is_floating_point() for part in state)
    assert (state[2] == 3).all()


def test_in_half_precision_the_state_still_counts():
    mixer = AttentionMixer(WIDTH, context=400).bfloat16()
    x = torch.randn(1, 301, WIDTH, dtype=torch.bfloat16)
    _, (_, _, filled) = run_in_parts(mixer, x, (257, 258, 259))
    assert filled.item() == 301


def test_a_sequence_that_starts_does_not_care_what_the_state_is():
    mixer = make_mixer()
    x = make_inputs()[0]
    bad = tuple(torch.full_like(part, float("nan")) for part in mixer.initial_state(BATCH))
    resets = torch.ones(BATCH, 1, dtype=torch.bool)
    y, state = mixer(x[:, :1], bad, resets=resets)
    expected, fresh = mixer(x[:, :1], mixer.initial_state(BATCH))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, fresh)


def test_in_single_precision_training_equals_acting():
    mixer = make_mixer(context=LENGTH, dtype=torch.float32)
    x = make_inputs()[0].float()
    whole, last = mixer(x)
    y, state = run_in_parts(mixer, x, range(1, LENGTH))
    torch.testing.assert_close(y, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(state, last, atol=1e-6, rtol=0)


@torch.no_grad()
def test_an_exported_step_equals_the_mixer():
    mixer = make_mixer(dtype=torch.float32).eval()
    x = torch.randn(1, 1, WIDTH)
    state = mixer.initial_state(1)
    for _ in range(3):
        _, state = mixer(x, state)
    resets = torch.tensor([[False]])
    program = torch.export.export(mixer, (x, state), {"resets": resets}).module()
    for starts in (resets, ~resets):
        torch.testing.assert_close(program(x, state, resets=starts), mixer(x, state, resets=starts))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"context": 5, "num_heads": 3}, "must divide"), ({"context": 0}, "at least 1")],
)
def test_what_is_impossible_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionMixer(WIDTH, **options)
