import dataclasses
import io
import os
import subprocess
import sys
import warnings

import pytest

from minrl import __version__, cli
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import flatten, paper, quick


def run(*arguments):
    command = [sys.executable, "-m", "minrl.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_lists_every_command_without_loading_torch():
    program = (
        "import sys; from minrl.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    for command in cli.COMMANDS:
        assert f"minrl {command}" in done.stdout
    assert done.stdout.endswith("False\n")


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"minrl {__version__}\n"


def test_the_package_is_a_command_too():
    done = subprocess.run(
        [sys.executable, "-m", "minrl", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"minrl {__version__}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_a_reader_that_goes_away_sees_no_traceback(arguments):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "minrl", *arguments], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (cli.CLOSED_PIPE, b"")


def test_a_terminal_that_knows_few_letters_stops_nothing(monkeypatch, capsys):
    command = lambda _: print("3,283 \N{PLUS-MINUS SIGN} 232") or 0  # noqa: E731
    monkeypatch.setitem(cli.COMMANDS, "doctor", (command, ""))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["doctor"]) == 0
    assert stream.buffer.getvalue() == b"3,283 ? 232\n"


def test_resuming_what_has_no_name_trains_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume", ""]) == 2
    assert "resume needs the folder of a run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    for name in [*flatten(quick()), "resume"]:
        assert f"--{name.replace('_', '-')}" in output
    assert "minutes on two CPU cores" in output


def test_the_paper_preset_shows_in_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "paper", "--dataset", "minrl/hopper/medium-v0", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "(default: 100000)" in output
    assert "(default: 256)" in output
    assert "(default: 0.0001)" in output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], quick()),
        (["--seed", "3"], dataclasses.replace(quick(), seed=3)),
        (["--preset=paper"], paper()),
        (["--backbone", "transformer"], quick(backbone="transformer")),
        (["--preset", "quick", "--preset", "paper"], paper()),
        (
            ["--dataset", "minrl/hopper/medium-v0", "minrl/hopper/medium-expert-v0", "--steps=7"],
            dataclasses.replace(
                quick(("minrl/hopper/medium-v0", "minrl/hopper/medium-expert-v0")), steps=7
            ),
        ),
    ],
)
def test_arguments_become_the_configuration(arguments, expected, monkeypatch, tmp_path):
    seen = []

    def remember(config, resume):
        seen.append((config, resume))
        return RunFolder.create(dataclasses.replace(config, run_dir=tmp_path / "run")).path

    monkeypatch.setattr("minrl.scripts.train.train", remember)
    assert cli.main(["train", *arguments]) == cli.INTERRUPTED  # nothing was trained
    assert seen == [(expected, None)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_threads_that_wait_do_not_spin_for_long_unless_told_to(given, expected):
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    others = {name: value for name, value in os.environ.items() if name not in names}
    program = (
        "import os; from minrl.cli import main; main(['--version']);"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=others | given
    )
    assert done.stdout.splitlines()[1:] == [expected]


def test_unknown_command_is_named(capsys):
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "--steps", "0"), "steps must be at least 1, not 0"),
        (("train", "--preset", "fast"), "preset must be one of quick, paper, not 'fast'"),
        (("evaluate", "nowhere"), "nowhere is not a run"),
        (("train", "--resume", "nowhere"), "nowhere is not a run"),
        (("datasets", "inspect", "no/such-v0"), "no/such-v0"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # main replaces it
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("minrl: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_a_file_in_the_way_is_a_mistake_too(tmp_path, capsys, monkeypatch, hopper_id):
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)
    (tmp_path / "file").write_text("")
    arguments = ["datasets", "inspect", hopper_id, "--png", str(tmp_path / "file" / "x.png")]
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.startswith("minrl: error: [Errno")


def test_a_mistake_in_a_new_process_has_no_traceback():
    done = run("train", "--dataset", "../x")
    assert done.returncode == 2
    assert done.stderr.startswith("minrl: error: malformed dataset id '../x'")
    assert "Traceback" not in done.stderr


@pytest.mark.integration
def test_train_then_evaluate_from_the_command_line(hopper_id, tmp_path):
    path = tmp_path / "run"
    small = "--width 16 --num-layers 1 --steps 4 --eval-every 4 --eval-episodes 1 --device cpu"
    done = run(
        "train",
        *("--dataset", hopper_id, "--run-dir", str(path), "--final-episodes", "2"),
        *small.split(),
    )
    assert done.returncode == 0, done.stderr
    best_tenth, _ = RunFolder(path).read_config().targets
    assert f"last        4     {best_tenth:g}" in done.stdout
    done = run(
        "evaluate",
        *(str(path), "--episodes", "2", "--targets", "1000", "2000", "--refresh-every", "1"),
        *("--video", str(tmp_path / "rollout.gif")),
    )
    assert done.returncode == 0, done.stderr
    assert "1000" in done.stdout
    assert (tmp_path / "rollout.gif").read_bytes().startswith(b"GIF8")
