import importlib

import pytest

from minrl.agents.adapters.libraries import check_call, interface_of
from minrl.errors import AdapterError


def test_a_missing_library_is_named_with_what_installs_it():
    missing = interface_of("no-such-library", install="pip install it", known="1")
    with pytest.raises(AdapterError, match="not installed: pip install it"), missing:
        importlib.import_module("no_such_library")


def test_a_package_that_the_library_lacks_is_named_with_what_installs_it():
    known = interface_of("torch", install="pip install torch[whole]", known="2")
    with (
        pytest.raises(AdapterError, match=r"not installed whole .*: pip install torch\[whole"),
        known,
    ):
        importlib.import_module("no_such_library.part")


@pytest.mark.parametrize(
    "look",
    [
        lambda: importlib.import_module("torch.no_such_module"),
        lambda: importlib.import_module("torch").no_such_function,
        lambda: importlib.import_module("torch").zeros(1, no_such_argument=True),
    ],
    ids=["module", "attribute", "argument"],
)
def test_another_interface_is_reported_with_its_version_and_those_that_work(look):
    import torch

    known = interface_of("torch", install="", known="0.1 to 0.3")
    with pytest.raises(AdapterError) as caught, known:
        look()
    assert torch.__version__.partition("+")[0] in str(caught.value)
    assert "0.1 to 0.3" in str(caught.value)


def test_a_call_that_no_longer_fits_is_named_and_not_made():
    class Theirs:
        def forward(self, batch, *, state):
            raise AssertionError

    check_call(Theirs.forward, None, {}, state=None)
    with pytest.raises(TypeError, match=r"Theirs\.forward: missing a required argument: 'state'"):
        check_call(Theirs.forward, None, {})


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), interface_of("torch", install="", known="1"):
        _ = 1 / 0
