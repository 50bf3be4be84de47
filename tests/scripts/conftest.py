import pytest
from small_runs import make_config

from minrl.scripts.study_grid import StudyConfig, runs_of
from minrl.scripts.train import train

SMALL = (
    *("width=16", "num-layers=1", "steps=12", "batch-size=8", "log-every=5", "device=cpu"),
    *("eval-every=4", "eval-episodes=2", "final-episodes=2"),
)


def _configure(folder, *, more=(), **options):
    options = {"tasks": ("hopper/medium-expert",), "backbones": ("mingru",), "seeds": 1, **options}
    return StudyConfig(set=(*SMALL, *more), folder=folder, **options)


@pytest.fixture(scope="session")
def small_study():
    """Return what configures a study of small runs in a folder."""
    return _configure


@pytest.fixture(scope="session")
def plan():
    """Return what lists the runs of such a study."""
    return lambda *arguments, **options: runs_of(_configure(*arguments, **options))


@pytest.fixture(scope="session")
def finished(hopper_id, tmp_path_factory):
    """A small run from start to end."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert train(make_config(hopper_id, path)) == path
    return path
