"""Fixtures for all tests: no network, no file outside a temporary folder (but our cache)."""

import contextlib
import os
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Set before any test imports a library that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

# No connections to other machines, neither from here nor from the processes that tests start.
OFFLINE = str(Path(__file__).parent / "offline")
if OFFLINE not in (paths := os.environ.get("PYTHONPATH", "").split(os.pathsep)):
    os.environ["PYTHONPATH"] = os.pathsep.join([OFFLINE, *filter(None, paths)])
    runpy.run_path(f"{OFFLINE}/sitecustomize.py")

# PyTorch imports Triton at some time, which ends the process if the LLVM of Mesa, which renders,
# is loaded already; the other way round they get on.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

torch.set_num_threads(1)  # the tests' tensors are small, and other processes want the cores
settings.register_profile("minrl", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("minrl")

SMALL_STEPS = 6_000


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what hangs where coverage is measured: Ctrl-C inside of its lock keeps that."""
    if config.pluginmanager.hasplugin("_cov"):
        for item in items:
            if item.get_closest_marker("interrupts"):
                item.add_marker(pytest.mark.skip(reason="Ctrl-C and coverage's lock"))


@pytest.fixture(scope="session", autouse=True)
def datasets_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets folder of the tests' own, also for the commands they start."""
    path = tmp_path_factory.mktemp("datasets")
    os.environ["MINARI_DATASETS_PATH"] = str(path)
    return path


@pytest.fixture(autouse=True)
def seed() -> None:
    """What a test draws does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests that are marked so open connections."""
    if request.node.get_closest_marker("network"):
        monkeypatch.setenv("MINRL_TEST_NETWORK", "1")


@pytest.fixture(scope="session")
def hopper_id(datasets_path: Path) -> str:
    """The id of a small embedded Hopper dataset that is there already."""
    from minrl.data.behaviours import make_embedded_dataset

    name = "minrl/hopper/medium-expert-v0"
    make_embedded_dataset(name, steps=SMALL_STEPS, progress=False)
    return name
