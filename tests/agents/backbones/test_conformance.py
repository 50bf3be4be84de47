"""Our cells and PyTorch's, through the same calls: what a user who changes one line relies on."""

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from minrl import MinGRU, MinLSTM

# What stands where: ours, and the layer whose call it takes.
PAIRS = {
    "MinGRU": (MinGRU, nn.GRU),
    "MinLSTM": (MinLSTM, nn.GRU),
    "MinLSTM-pair": (functools.partial(MinLSTM, return_cell=True), nn.LSTM),
}
each_pair = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
each_cell = pytest.mark.parametrize("make", [pair[0] for pair in PAIRS.values()], ids=PAIRS)


@pytest.fixture
def plain_pytorch():
    """Without oneDNN, whose texts are its own, and which has nn.LSTM in half on some CPUs only."""
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of GPUs besides
    yield
    torch._C._set_mkldnn_enabled(True)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def draw_state(make, *shape):
    """Return a state as this layer wants it: a tensor, or a pair of them."""
    pair = make is nn.LSTM or isinstance(make, functools.partial)
    return (draw(*shape), draw(*shape)) if pair else draw(*shape)


def on_meta(state):
    """Return a state on another device than the CPU."""
    return state.to("meta") if isinstance(state, torch.Tensor) else tuple(map(on_meta, state))


def to_type(make, dtype):
    """Return a state of another type."""
    state = draw_state(make, 1, 4, 5)
    return state.to(dtype) if isinstance(state, torch.Tensor) else tuple(h.to(dtype) for h in state)


def draw_packed(*lengths, in_order=False):
    return pack_sequence([draw(length, 3) for length in lengths], enforce_sorted=in_order)


def layout(value):
    """Return everything about a result but its numbers."""
    if isinstance(value, PackedSequence):
        indices = [i if i is None else i.tolist() for i in value[2:]]
        return ["packed", layout(value.data), value.batch_sizes.tolist(), indices]
    if isinstance(value, torch.Tensor):
        return list(value.shape), value.dtype, value.requires_grad
    return [layout(part) for part in value]


CALLS = {
    "time first": lambda make: make(3, 5)(draw(7, 4, 3)),
    "batch first": lambda make: make(3, 5, batch_first=True)(draw(4, 7, 3)),
    "unbatched": lambda make: make(3, 5, 2)(draw(7, 3)),
    "unbatched batch first": lambda make: make(3, 5, batch_first=True)(draw(7, 3)),
    "unbatched with state": lambda make: make(3, 5, 2)(draw(7, 3), draw_state(make, 2, 5)),
    "with state": lambda make: make(3, 5, 2)(draw(7, 4, 3), draw_state(make, 2, 4, 5)),
    "batch first with state": lambda make: make(3, 5, 2, True, True)(
        draw(4, 7, 3), draw_state(make, 2, 4, 5)
    ),
    "one step": lambda make: make(3, 5)(draw(1, 4, 3)),
    "one sequence": lambda make: make(3, 5)(draw(7, 1, 3)),
    "no sequence": lambda make: make(3, 5)(draw(7, 0, 3)),
    "no bias": lambda make: make(3, 5, bias=False)(draw(7, 4, 3)),
    "dropout": lambda make: make(3, 5, 3, dropout=0.5)(draw(7, 4, 3)),
    "dropout in evaluation": lambda make: make(3, 5, 3, dropout=0.5).eval()(draw(7, 4, 3)),
    "float64": lambda make: make(3, 5, dtype=torch.float64)(draw(7, 4, 3).double()),
    "meta": lambda make: make(3, 5, device="meta")(draw(7, 4, 3).to("meta")),
    "packed": lambda make: make(3, 5, 2)(draw_packed(4, 7, 4)),
    "packed in order": lambda make: make(3, 5)(draw_packed(7, 4, 4, in_order=True)),
    "packed with state": lambda make: make(3, 5)(draw_packed(4, 7), draw_state(make, 1, 2, 5)),
    "no gradient": lambda make: make(3, 5).requires_grad_(False)(draw(7, 4, 3)),
}


@each_pair
@pytest.mark.parametrize("call", CALLS)
def test_results_are_laid_out_alike(call, ours, theirs):
    assert layout(CALLS[call](ours)) == layout(CALLS[call](theirs))


MISTAKES = {
    "features": lambda make: make(3, 5)(draw(7, 4, 2)),
    "features unbatched": lambda make: make(3, 5)(draw(7, 2)),
    "four axes": lambda make: make(3, 5)(draw(7, 4, 3, 1)),
    "one axis": lambda make: make(3, 5)(draw(3)),
    "no step": lambda make: make(3, 5)(draw(0, 4, 3)),
    "state's batch": lambda make: make(3, 5)(draw(7, 4, 3), draw_state(make, 1, 2, 5)),
    "state's layers": lambda make: make(3, 5, 2)(draw(7, 4, 3), draw_state(make, 1, 4, 5)),
    "state's width": lambda make: make(3, 5)(draw(7, 4, 3), draw_state(make, 1, 4, 6)),
    "state unbatched": lambda make: make(3, 5)(draw(7, 4, 3), draw_state(make, 1, 5)),
    "state batched": lambda make: make(3, 5)(draw(7, 3), draw_state(make, 1, 4, 5)),
    "state elsewhere": lambda make: make(3, 5)(draw(7, 4, 3), on_meta(draw_state(make, 1, 4, 5))),
    "state of float64": lambda make: make(3, 5)(draw(7, 4, 3), to_type(make, torch.float64)),
    "state of integers": lambda make: make(3, 5)(draw(7, 4, 3), to_type(make, torch.int64)),
    "float64 input": lambda make: make(3, 5)(draw(7, 4, 3).double()),
    "integer input": lambda make: make(3, 5)(torch.ones(7, 4, 3, dtype=torch.int64)),
    "no hidden features": lambda make: make(3, 0),
    "no input features": lambda make: make(0, 5),
    "no layers": lambda make: make(3, 5, 0),
    "dropout for bias": lambda make: make(3, 5, 2, 0.1),
    "batch_first a number": lambda make: make(3, 5, 2, True, 1),
    "broken hidden size": lambda make: make(3, 5.0),
    "dropout above 1": lambda make: make(3, 5, 2, dropout=2),
    "dropout a bool": lambda make: make(3, 5, 2, dropout=True),
    "dropout a word": lambda make: make(3, 5, 2, dropout="much"),
    "dropout of the only layer": lambda make: make(3, 5, dropout=0.5),
    "no size": lambda make: make(3),
}


@each_pair
@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("plain_pytorch")
def test_mistakes_read_alike(mistake, ours, theirs):
    raised = []
    for make in (theirs, ours):
        with pytest.raises((Warning, RuntimeError, ValueError, TypeError)) as caught:
            MISTAKES[mistake](make)
        name = nn.GRU.__base__.__name__ if make is theirs else MinGRU.__base__.__name__
        text = str(caught.value).replace(name, "Layer")
        for layer in ("MinGRU", "MinLSTM", "GRU", "LSTM"):
            text = text.replace(f"{layer}:", "Layer:")
        raised.append((caught.type, text))
    assert raised[0] == raised[1]


@each_cell
def test_an_input_on_another_device_is_named(make):
    with pytest.raises(RuntimeError, match="input tensor at cpu and parameter tensor at meta"):
        make(3, 5, device="meta")(draw(7, 4, 3))


@each_pair
def test_attributes_are_the_same(ours, theirs):
    cells = [make(3, 5, 2, False, True, 0.25) for make in (ours, theirs)]
    for name in (
        *("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout"),
        *("bidirectional", "proj_size"),
    ):
        values = [getattr(cell, name) for cell in cells]
        assert values[0] == values[1], name
        assert type(values[0]) is type(values[1]), name
    texts = [repr(cell).partition("(")[2].rstrip(")") for cell in cells]
    assert texts[0].startswith(texts[1])
    assert "learn_initial_state=True" in repr(ours(3, 5, learn_initial_state=True))
    assert [len(layer) for layer in ours(3, 5, 2).all_weights] == [2, 2]
    assert [len(layer) for layer in cells[0].all_weights] == [1, 1]


@each_pair
def test_public_names_of_nn_gru_are_there(ours, theirs):
    generic = set(dir(nn.Module()))
    public = {name for name in set(dir(theirs(3, 5))) - generic if not name.startswith("_")}
    # The recurrent weights, which there are none of, and helpers of its own forward pass.
    left_out = {"weight_hh_l0", "bias_hh_l0", "mode", "permute_hidden"}
    left_out |= {name for name in public if name.startswith(("check_", "get_expected_"))}
    assert public - left_out <= set(dir(ours(3, 5)))


@each_cell
def test_a_state_that_is_not_single_or_paired_is_refused(make):
    cell, pair = make(3, 5), (draw(1, 4, 5), draw(1, 4, 5))
    wrong = pair[0] if cell.return_cell else pair
    with pytest.raises(TypeError, match="return_cell"):
        cell(draw(7, 4, 3), wrong)
    with pytest.raises(TypeError, match="return_cell"):
        cell.step(draw(4, 3), wrong)


@pytest.mark.parametrize(
    "second",
    [(draw(1, 9, 5),), (draw(4, 5),), (draw(1, 4, 5),) * 2],
    ids=["shape", "axes", "third"],
)
def test_a_second_state_that_does_not_fit_is_refused_as_nn_lstm_does(second):
    for cell in (nn.LSTM(3, 5), MinLSTM(3, 5, return_cell=True)):
        with pytest.raises(RuntimeError, match=r"hidden\[1\] size|should also be|expects two"):
            cell(draw(7, 4, 3), (draw(1, 4, 5), *second))
    with pytest.raises(RuntimeError, match="expects two hidden states"):
        MinLSTM(3, 5, return_cell=True)(draw(7, 4, 3), (draw(1, 4, 5),))


def test_the_warning_of_dropout_points_at_its_caller():
    for make in (MinGRU, MinLSTM):
        with pytest.warns(UserWarning, match="dropout option") as caught:
            make(3, 5, dropout=0.5)
        assert caught[0].filename == __file__


def test_a_pair_is_the_single_state_twice():
    torch.manual_seed(0)
    single = MinLSTM(3, 5, 2)
    paired = MinLSTM(3, 5, 2, return_cell=True)
    paired.load_state_dict(single.state_dict())
    x, h = draw(7, 4, 3), draw(2, 4, 5)
    expected, h_n = single(x, h)
    for c in (torch.zeros_like(h), torch.full_like(h, float("nan"))):
        for pair in ((h, c), [h, c]):
            output, (h_pair, c_pair) = paired(x, pair)
            assert torch.equal(output, expected)
        assert torch.equal(h_pair, h_n)
        assert torch.equal(c_pair, h_n)
    y, (h_step, _) = paired.step(x[0], paired.initial_state(4))
    assert torch.equal(y, single.step(x[0])[0])
    assert torch.equal(h_step, single.step(x[0])[1])


@each_cell
@pytest.mark.parametrize("argument", [{"bidirectional": True}, {"proj_size": 2}])
def test_what_has_no_meaning_is_refused_by_name(make, argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        make(3, 5, **argument)


@each_cell
def test_copies_act_the_same(make):
    cell, x = make(3, 5, 2, dropout=0.1).eval(), draw(7, 4, 3)
    assert all(name.startswith(("weight_", "bias_")) for name in cell.state_dict())
    loaded = make(3, 5, 2).eval()
    loaded.load_state_dict(cell.state_dict())
    saved = io.BytesIO()
    torch.save(cell, saved)
    saved.seek(0)
    copies = [loaded, copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))]  # noqa: S301
    copies.append(torch.load(saved, weights_only=False))
    expected = cell(x)[0]
    for other in copies:
        assert torch.equal(other(x)[0], expected)


@each_pair
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("plain_pytorch")
def test_half_types_and_autocast_give_outputs_of_the_same_type(dtype, ours, theirs):
    half = [make(3, 5).to(dtype)(draw(7, 4, 3).to(dtype))[0].dtype for make in (ours, theirs)]
    assert half[0] == half[1]
    cells = [ours(3, 5), theirs(3, 5)]
    with torch.autocast("cpu", dtype):
        (output, state), (their_output, _) = [cell(draw(7, 4, 3)) for cell in cells]
    assert output.dtype is dtype
    assert their_output.dtype is torch.float32  # autocast on the CPU leaves them alone
    state = state[0] if cells[0].return_cell else state
    assert state.dtype is torch.float32  # a state in half precision would lose what it sums


@each_cell
def test_compiled_with_pairs_and_flags_is_the_same(make):
    torch.compiler.reset()
    cell = make(3, 5, 2, batch_first=True)
    resets, mask = torch.rand(4, 7) < 0.3, torch.rand(4, 7) < 0.9
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    arguments = (draw(4, 7, 3), draw_state(make, 2, 4, 5))
    expected = cell(*arguments, resets=resets, mask=mask)
    torch.testing.assert_close(compiled(*arguments, resets=resets, mask=mask), expected)


@each_cell
@pytest.mark.parametrize("batch_first", [False, True], ids=["time first", "batch first"])
def test_no_gradient_crosses_a_reset(make, batch_first):
    cell = make(3, 5, 2, batch_first=batch_first)
    x = draw(4, 9, 3).requires_grad_()
    resets = torch.zeros(4, 9, dtype=torch.bool)
    for row, step in enumerate((0, 3, 5, 8)):
        resets[row, step] = True
    moved = (lambda y: y) if batch_first else (lambda y: y.transpose(0, 1))
    h = draw(2, 4, 5).requires_grad_()
    output, _ = cell(moved(x), (h, h) if cell.return_cell else h, resets=moved(resets))
    output.select(1 if batch_first else 0, -1).sum().backward()
    for row, step in enumerate((0, 3, 5, 8)):
        assert (x.grad[row, :step] == 0).all()
        assert (x.grad[row, step:].abs().sum(-1) > 0).all()
    assert (h.grad == 0).all()


@each_cell
def test_cleanrls_loop_over_steps_equals_one_pass_with_resets(make):
    """As in its ppo_atari_lstm.py: one step a call, the state times 1 - done."""
    core, x = make(3, 5, 2), draw(9, 4, 3)
    dones = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) < 0.3
    first = state = draw_state(make, 2, 4, 5)
    outputs = []
    for hidden, done in zip(x, dones, strict=True):
        keep = (1.0 - done.float()).view(1, -1, 1)
        kept = keep * state if isinstance(state, torch.Tensor) else tuple(keep * h for h in state)
        output, state = core(hidden.unsqueeze(0), kept)
        outputs.append(output)
    together, last = core(x, first, resets=dones)
    torch.testing.assert_close(together, torch.cat(outputs))
    torch.testing.assert_close(last, state)


@each_cell
def test_masks_and_resets_agree_on_the_same_episodes(make):
    """Two episodes in a row with a reset between, and each padded on its own with a mask."""
    cell = make(3, 5, 2, batch_first=True)
    x, resets = draw(1, 10, 3), torch.zeros(1, 10, dtype=torch.bool)
    resets[0, 4] = True
    together, _ = cell(x, resets=resets)
    padded = torch.zeros(2, 6, 3)
    padded[0, :4], padded[1] = x[0, :4], x[0, 4:]
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    apart, last = cell(padded, mask=mask)
    last = last[0] if cell.return_cell else last
    torch.testing.assert_close(apart[mask], together[0])
    torch.testing.assert_close(last[-1], together[0, [3, 9]])


def train_half(rank, folder):
    """Do what one of two processes does: half of the batch, for each cell; keep the gradients."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for name, (make, _) in PAIRS.items():
        torch.manual_seed(rank)  # the weights of the first process are those of both
        cell = DistributedDataParallel(make(3, 5, 2, learn_initial_state=True))
        x = draw(7, 4, 3)[:, 2 * rank : 2 * rank + 2]
        cell(x)[0].square().mean().backward()
        gradients = [parameter.grad for parameter in cell.parameters()]
        torch.save(gradients, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_gradients_of_the_whole_batch(tmp_path):
    torch.multiprocessing.spawn(train_half, (str(tmp_path),), nprocs=2)
    for name, (make, _) in PAIRS.items():
        torch.manual_seed(0)
        cell = make(3, 5, 2, learn_initial_state=True)
        cell(draw(7, 4, 3))[0].square().mean().backward()
        for rank in range(2):
            gradients = torch.load(tmp_path / f"{name}-{rank}.pt")
            torch.testing.assert_close(gradients, [p.grad for p in cell.parameters()])
