import copy
import importlib

import pytest
import torch

pytest.importorskip("torchrl")

from tensordict import TensorDict
from torchrl.envs import TensorDictPrimer
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from minrl.agents.adapters import torchrl as adapter
from minrl.agents.adapters.torchrl import BackboneModule, MinGRUModule, MinLSTMModule
from minrl.agents.backbones.blocks import Backbone
from minrl.agents.backbones.cells import MinGRU, MinLSTM
from minrl.errors import AdapterError

KEYS = {"in_key": "x", "out_key": "y"}
STATE, NEXT_STATE = "recurrent_state", ("next", "recurrent_state")


def _randomised(module):
    """Move every parameter, the learned initial states (zero at first) among them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


MODULES = {
    "mingru": lambda: MinGRUModule(4, 5, 2, **KEYS),
    "minlstm": lambda: MinLSTMModule(4, 5, 2, **KEYS),
    "learned initial state": lambda: MinGRUModule(4, 5, 2, learn_initial_state=True, **KEYS),
    "backbone": lambda: BackboneModule(Backbone(4, 2, convolution=3), **KEYS),
}


@pytest.fixture(params=MODULES)
def module(request):
    torch.manual_seed(0)
    return _randomised(MODULES[request.param]())


def _sequences(shape, starts=0.3, features=4):
    """Return sequences as a rollout leaves them, with episodes that start anywhere."""
    return TensorDict(
        {"x": torch.randn(*shape, features), "is_init": torch.rand(*shape, 1) < starts}, shape
    )


def _step_by_step(module, data):
    """Run a step at a time as a rollout does; also store the states, zero where it is reset."""
    outputs, states = [], []
    initial = module._initial_state()[0]
    carried = torch.full((*data.batch_size[:-1], *initial.shape), 0.3)
    for step in data.unbind(-1):
        step = step.copy().set(STATE, carried)
        start = step["is_init"].reshape(*step.batch_size, *[1] * (carried.dim() - step.ndim))
        states.append(torch.where(start, 0.0, carried))
        step = module(step)
        carried = step[NEXT_STATE]
        outputs.append(step["y"])
    data = data.copy().set(STATE, torch.stack(states, data.ndim - 1).detach())
    return torch.stack(outputs, data.ndim - 1), carried, data


def _in_sequence(module, data):
    with set_recurrent_mode(True):
        return module(data.copy())


@pytest.mark.parametrize("shape", [(9,), (3, 9), (2, 3, 9), (2, 1)])
def test_stepwise_equals_sequence_with_resets_inside(module, shape):
    outputs, last, data = _step_by_step(module, _sequences(shape))
    result = _in_sequence(module, data)
    torch.testing.assert_close(result["y"], outputs)
    torch.testing.assert_close(result[NEXT_STATE].select(len(shape) - 1, -1), last)
    assert result[NEXT_STATE].shape == result[STATE].shape


def test_sequence_without_stored_states_starts_from_the_initial_state(module):
    data = _sequences((3, 9))
    data["is_init"][:, 0] = True
    outputs, _, _ = _step_by_step(module, data)
    torch.testing.assert_close(_in_sequence(module, data)["y"], outputs)


def test_state_stored_where_a_slice_starts_is_taken_up(module):
    outputs, last, data = _step_by_step(module, _sequences((2, 12), starts=0.2))
    cut = torch.zeros_like(data["is_init"])
    cut[0, 5], cut[1, 2], cut[1, 7] = True, True, True
    # What a replay buffer of slices does: it marks where they start, and keeps what was stored.
    result = _in_sequence(module, data.copy().set("is_init", data["is_init"] | cut))
    torch.testing.assert_close(result["y"], outputs)
    torch.testing.assert_close(result[NEXT_STATE][:, -1], last)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("stored", [0.0, 1.0])
def test_equals_torchrl_modules_around_the_same_core(recurrent, stored):
    torch.manual_seed(0)
    data = _sequences((3, 4, 9))
    data[STATE] = torch.rand(3, 4, 9, 2, 5) * (~data["is_init"].unsqueeze(-1) + stored).clamp(max=1)
    gru = MinGRU(4, 5, 2, batch_first=True)
    pair = MinLSTM(4, 5, 2, batch_first=True, return_cell=True)
    lstm = MinLSTMModule(4, 5, 2, **KEYS)
    lstm.lstm.load_state_dict(pair.state_dict())
    data["h"] = data["c"] = data[STATE]
    lstm_keys = {"in_keys": ["x", "h", "c"], "out_keys": ["y", ("next", "h"), ("next", "c")]}
    cases = [
        (MinGRUModule(gru=gru, **KEYS), GRUModule(gru=gru, **KEYS), NEXT_STATE),
        (lstm, LSTMModule(lstm=pair, **lstm_keys), ("next", "h")),
    ]
    for ours, theirs, their_state in cases:
        with set_recurrent_mode(recurrent):
            result, expected = ours(data.copy()), theirs(data.copy())
        torch.testing.assert_close(result["y"], expected["y"])
        steps = slice(-1, None) if recurrent else slice(None)
        torch.testing.assert_close(
            result[NEXT_STATE][:, :, steps], expected[their_state][:, :, steps]
        )


@pytest.mark.parametrize("backend", ["scan", "triton"])
def test_backends_that_read_the_weights_do_not_take_the_bare_cell(backend):
    theirs = GRUModule(gru=MinGRU(4, 5, batch_first=True), **KEYS)
    theirs.recurrent_backend = backend  # not as an argument: that compiles something first
    data = _sequences((2, 9)).set(STATE, torch.zeros(2, 9, 1, 5))
    with pytest.raises(AttributeError, match="_all_weights"):
        _in_sequence(theirs, data)


def test_gradient_is_cut_at_resets(module):
    data = _sequences((1, 9), starts=0.0)
    data["is_init"][:, 0] = data["is_init"][:, 5] = True
    data["x"].requires_grad_()
    _in_sequence(module, data)["y"][:, 7].sum().backward()
    seen = data["x"].grad.abs().sum(-1) > 0
    assert seen.squeeze(0).tolist() == [False] * 5 + [True] * 3 + [False]


def test_gradient_reaches_stored_states():
    module = MinGRUModule(4, 5, **KEYS)
    data = _sequences((2, 9), starts=0.0)
    data["is_init"][:, 4] = True
    data[STATE] = torch.rand(2, 9, 1, 5).requires_grad_()
    _in_sequence(module, data)["y"].sum().backward()
    steps = data[STATE].grad.abs().sum((0, 2, 3)) > 0
    assert steps.nonzero().squeeze(1).tolist() == [0, 4]


def test_copies_and_state_dicts_fit(module):
    data = _sequences((2, 9))
    expected = _in_sequence(module, data)["y"]
    copied = copy.deepcopy(module)
    _randomised(copied)
    copied.load_state_dict(module.state_dict())
    torch.testing.assert_close(_in_sequence(copied, data)["y"], expected)


def test_state_dict_is_that_of_torchrl_around_the_cell():
    theirs = GRUModule(gru=MinGRU(4, 5, 2, batch_first=True), **KEYS)
    MinGRUModule(4, 5, 2, **KEYS).load_state_dict(theirs.state_dict())


# torch.compile looks at the gradients of what passes its seams, and is warned of it.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("recurrent", [False, True])
def test_compiled_equals_eager(recurrent):
    module = MinGRUModule(4, 5, 2, **KEYS)
    _, _, data = _step_by_step(module, _sequences((2, 9)))
    compiled = torch.compile(module, backend="aot_eager")
    with set_recurrent_mode(recurrent):
        result, expected = compiled(data.copy()), module(data.copy())
    torch.testing.assert_close(result["y"], expected["y"])
    torch.testing.assert_close(result[NEXT_STATE], expected[NEXT_STATE])


def test_called_with_tensors_and_by_default_mode():
    module = MinGRUModule(4, 5, default_recurrent_mode=True, **KEYS)
    data = _sequences((2, 9)).set(STATE, torch.zeros(2, 9, 1, 5))
    assert module.recurrent_mode
    output, state = module(x=data["x"], recurrent_state=data[STATE], is_init=data["is_init"])
    torch.testing.assert_close(output, _in_sequence(module, data)["y"])
    assert state.shape == (2, 9, 1, 5)
    with set_recurrent_mode(False):
        assert not module.recurrent_mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 4, "hidden_size": 5, "in_key": "x"}, "out_key"),
        ({"input_size": 4, "hidden_size": 5, "in_keys": ["x", "h"], **KEYS}, "in_key"),
        ({"input_size": 4, "hidden_size": 5, "in_keys": ["x"], "out_key": "y"}, "takes an input"),
        ({"input_size": 4, "hidden_size": 5, "batch_first": False, **KEYS}, "batch_first"),
        ({"lstm": MinLSTM(4, 5, return_cell=True, batch_first=True), **KEYS}, "one state"),
        ({"lstm": MinLSTM(4, 5, batch_first=True), "input_size": 4, **KEYS}, "either lstm"),
        ({"input_size": 4, "hidden_size": 5, "bidirectional": True, **KEYS}, "bidirectional"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MinLSTMModule(**arguments)


def test_the_librarys_own_choices_of_an_implementation_change_nothing():
    keys = {"in_keys": ["x", "h"], "out_keys": ["y", "h"]}
    module = MinGRUModule(4, 5, python_based=False, recurrent_backend="pad", **keys)
    assert module.state_dict().keys() == MinGRUModule(4, 5, **keys).state_dict().keys()


def test_sequence_without_time_and_primer_without_next_are_refused():
    module = MinGRUModule(4, 5, in_keys=["x", "h"], out_keys=["y", "h"])
    with pytest.raises(RuntimeError, match="not carried over"):
        module.make_tensordict_primer()
    with pytest.raises(ValueError, match="no time dimension"):
        _in_sequence(module, _sequences(()))


def test_a_step_without_a_state_is_the_first_of_an_episode(module):
    steps = _sequences((4,), starts=1.1)
    expected = module(steps.copy().set(STATE, torch.zeros(4, *module._initial_state().shape[1:])))
    torch.testing.assert_close(module(steps.copy())["y"], expected["y"])
    steps["is_init"][2] = False  # as where no primer carries the state on
    with pytest.raises(KeyError, match=r"no 'recurrent_state' in the middle.*tensordict_primer"):
        module(steps)


def test_a_core_that_does_not_fit_and_arguments_beside_one_are_refused():
    keys = {"in_key": "x", "out_key": "y"}
    with pytest.raises(ValueError, match="batch_first"):
        BackboneModule(Backbone(8, batch_first=False), **keys)
    with pytest.raises(ValueError, match="remembers nothing"):
        BackboneModule(Backbone(8, backbone="mlp"), **keys)
    with pytest.raises(ValueError, match="must be a MinLSTM"):
        MinLSTMModule(lstm=MinGRU(3, 5, batch_first=True), **keys)
    with pytest.raises(ValueError, match="must be a MinGRU"):
        MinGRUModule(gru=torch.nn.GRU(3, 5, batch_first=True), **keys)
    with pytest.raises(ValueError, match="give either gru or"):
        MinGRUModule(gru=MinGRU(3, 5, batch_first=True), num_layers=2, **keys)


def test_a_changed_interface_is_named(monkeypatch):
    def without_expand_specs(self, primers):
        """Lack an argument."""

    monkeypatch.setattr(TensorDictPrimer, "__init__", without_expand_specs)
    message = (
        r"plug into torchrl .*unexpected keyword argument 'expand_specs'.*known to work: 0\.14"
    )
    with pytest.raises(AdapterError, match=message):
        importlib.reload(adapter)


@pytest.mark.parametrize("missing", ["x", "is_init"])
def test_a_missing_key_is_named(missing):
    module = MinGRUModule(3, 5, in_key="x", out_key="y")
    steps = TensorDict(
        {"x": torch.zeros(4, 3), "is_init": torch.ones(4, 1, dtype=torch.bool)}, batch_size=[4]
    )
    with pytest.raises(KeyError, match=missing):
        module(steps.exclude(missing))
