import h5py
import numpy as np
import pytest
import tyro

from minrl.errors import ConfigError, DatasetError
from minrl.scripts.datasets import COMMANDS, format_number

HOPPER = "minrl/hopper/medium-replay-v0"


def run(*arguments):
    return tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="minrl datasets", args=arguments)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0.0, "0.0"), (3.14159, "3.1"), (123_456.78, "123,456.8"), (0.00123, "0.00123")),
        *((-1.23456e12, "-1.23e+12"), (-999_999.96, "-1e+06"), (-2.5e-12, "-2.5e-12")),
    ],
)
def test_numbers_of_any_size_fit_their_column(number, text):
    assert format_number(number) == text
    assert len(text) < 11


def test_make_list_and_inspect(root, capsys):
    run("make", HOPPER, "--steps", "300", "--seed", "1")
    assert f"{HOPPER}: made" in capsys.readouterr().out
    run("make", HOPPER)
    assert "exists already, left as it is" in capsys.readouterr().out
    run("list")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(HOPPER) and "300  Hopper-v5" in line for line in lines)
    assert sum("made on first use" in line for line in lines) == 8
    run("inspect", HOPPER)
    out = capsys.readouterr().out
    for text in (
        "Hopper-v5, 1,000 steps at most",
        "steps        300",
        "embedded minrl data on Hopper-v5",
        "score, %",
        "median",
    ):
        assert text in out
    picture = root / "minrl-hopper-medium-replay-v0.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    run("inspect", HOPPER, HOPPER, "--png", str(root / "union.png"))
    assert "steps        600" in capsys.readouterr().out
    assert (root / "union.png").exists()


def test_import_shows_what_was_imported(root, capsys):
    path = root / "hopper_medium-v2.hdf5"
    rows = 40
    with h5py.File(path, "w") as file:
        file["observations"] = np.zeros((rows, 11), np.float32)
        file["next_observations"] = np.zeros((rows, 11), np.float32)
        file["actions"] = np.zeros((rows, 3), np.float32)
        file["rewards"] = np.full(rows, 3234.3 / 20, np.float32)
        file["terminals"] = np.arange(rows) % 20 == 19
        file["timeouts"] = np.zeros(rows, bool)
    run("import-d4rl", str(path), "--id", "mine/hopper/m-v2")
    out = capsys.readouterr().out
    assert "mine/hopper/m-v2" in out
    assert "D4RL-v2 data on Hopper-v4, D4RL reference scores" in out
    score = next(line for line in out.splitlines() if line.startswith("score, %"))
    assert float(score.split()[2]) == 100.0


def test_wrong_requests_end_in_clear_errors(root):
    with pytest.raises(DatasetError, match=r"malformed dataset id '\.\./x'"):
        run("inspect", "../x")
    with pytest.raises(DatasetError, match="no embedded dataset"):
        run("make", "mujoco/hopper/medium-v0")
    with pytest.raises(ConfigError, match="seed must be at least 0, got -1"):
        run("make", HOPPER, "--seed", "-1")
    with pytest.raises(ConfigError, match="at least one dataset id"):
        run("inspect")
    with pytest.raises(DatasetError, match="there is no file"):
        run("import-d4rl", "hopper_medium-v2.hdf5")
