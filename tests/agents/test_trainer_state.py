import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minrl.agents.checkpoint import CheckpointFolder, load_weights, pack_weights
from minrl.agents.trainer_state import put_together, take_apart
from minrl.errors import CheckpointError

KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
SHAPES = ((), (0,), (3,), (2, 3), (2, 0, 4))
TENSORS = st.builds(
    lambda shape, dtype, seed: torch.from_numpy(
        np.random.default_rng(seed).integers(0, 2, size=shape)
    ).to(dtype),
    st.sampled_from(SHAPES),
    st.sampled_from(KINDS),
    st.integers(0, 9),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**127), 2**128),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
KEYS = st.text() | st.integers(-5, 5)


def nest(children):
    lists = st.lists(children, max_size=3)
    return st.one_of(lists, lists.map(tuple), st.dictionaries(KEYS, children, max_size=3))


STATES = st.dictionaries(KEYS, st.recursive(PLAIN | TENSORS, nest, max_leaves=10), max_size=3)


def assert_same(found, expected):
    """Compare types, the order of keys, and tensors bit for bit."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(map(repr, found)) == list(map(repr, expected))
        assert_same(list(found.values()), list(expected.values()))
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert repr(found) == repr(expected)  # -0.0 is not 0.0


@given(STATES)
def test_a_state_comes_back_as_it_was(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("states") / "state.safetensors"
    tree, tensors = take_apart(state)
    path.write_bytes(pack_weights(tensors, {"tree": tree}))
    tensors, header = load_weights(path)
    assert_same(put_together(header["tree"], tensors), state)


def test_what_training_may_hold_comes_back(tmp_path):
    generator = np.random.default_rng(0)
    generator.normal(size=3)
    shared = torch.arange(6.0)
    state = {
        "generator": generator.bit_generator.state,  # whole numbers of 128 bits
        "step": 10**12,
        "smallest": 5e-324,
        "keys": {1: "one", "1": "text", -1: None, "a.b": 1, "a": {"b": torch.ones(1)}},
        "betas": (0.9, 0.999),
        "long": list(range(2500)),
        "text": "\u03b1 \u2028 \x00",
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "strided": torch.ones(2, 3).T,
        "shared": [shared, shared, shared[1:], shared.view(2, 3)],
    }
    folder = CheckpointFolder(tmp_path)
    folder.save(1, {"w": shared, "v": shared}, {}, state)
    found = folder.trainer_state(1)
    assert_same(found, state)
    again = np.random.default_rng(1)
    again.bit_generator.state = found["generator"]
    assert again.normal() == generator.normal()


def test_tensors_that_shared_memory_are_saved_whole_and_share_no_more():
    shared = torch.zeros(4)
    tree, tensors = take_apart({"one": shared, "two": shared[:2]})
    assert len(tensors) == 2
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    found = put_together(tree, copies)
    found["one"].fill_(1.0)
    assert found["two"].tolist() == [0.0, 0.0]


def deep(depth):
    state = inner = {}
    for _ in range(depth):
        inner["a"] = inner = {}
    return state


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "a float: nan"),
        (math.inf, "a float: inf"),
        ({1, 2}, "a set: {1, 2}"),
        (b"text", "a bytes"),
        (np.float64(1.0), "a float64"),
        (np.ones(2), "a ndarray"),
        (object, "a type"),
        ({(1, 2): 3}, r"a dict: {\(1, 2\)"),
        ({True: 3}, "a dict: {True"),
        (deep(60), "nested more than 50 deep"),
        (torch.tensor([1.0, math.nan]), "not finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_would_not_come_back_is_refused_by_name(tmp_path, value, message):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(CheckpointError, match=rf"part.*{message}|{message}.*part"):
        folder.save(1, {}, {}, OrderedDict(part=[value]))
    assert folder.steps() == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"dict": []}, "the tensor a has no place"),
        ([{"tensor": "a"}], "it is no dict"),
        ({"dict": [["x", math.nan], ["y", {"tensor": "a"}]]}, "nan is not finite"),
        ({"dict": [["x", {"tensor": "a"}], ["y", {"tensor": "a"}]]}, "not there, or was used"),
        ({"dict": [["x", {"tensor": 1}]]}, "an object of unknown kind, with tensor"),
        ({"dict": [["x", {"other": "a"}]]}, "an object of unknown kind, with other"),
        ({"dict": [["x", {"other": []}]]}, "an object of unknown kind, with other"),
        ({"dict": [["x", {"tuple": "a"}]]}, "an object of unknown kind, with tuple"),
        ({"dict": [["x"]]}, "something other than keys and values"),
        ({"dict": ["xy"]}, "something other than keys and values"),
        ({"dict": [[None, 1]]}, "something other than keys and values"),
    ],
)
def test_a_tree_that_was_never_taken_apart_is_refused(tree, message):
    with pytest.raises(ValueError, match=message):
        put_together(tree, {"a": torch.ones(1)})


@pytest.mark.parametrize("nested", [lambda inner: [inner], lambda inner: {"dict": [["a", inner]]}])
def test_what_is_nested_as_deeply_as_can_be_saved_can_be_read_and_no_deeper(nested):
    def tree(depth):
        inner = 1
        for _ in range(depth - 1):
            inner = nested(inner)
        return {"dict": [["a", inner]]}

    assert isinstance(put_together(tree(50), {}), dict)
    with pytest.raises(ValueError, match="nested more than 50 deep"):
        put_together(tree(51), {})
    assert put_together(*take_apart(deep(50))) == deep(50)
    with pytest.raises(CheckpointError, match="nested more than 50 deep"):
        take_apart(deep(51))
