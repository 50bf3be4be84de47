import subprocess
import sys

import pytest

from minrl import __version__, cli


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


def test_train_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    flags = "dataset environment preset backbone tokens context steps seed device run-dir resume"
    for flag in [*flags.split(), "learning-rate", "refresh-every", "burn-in", "action-dropout"]:
        assert f"--{flag}" in output
    assert "minutes on two CPU cores" in output


def test_the_paper_preset_shows_in_the_defaults(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--preset", "paper", "--dataset", "minrl/hopper/medium-v0", "--help"])
    output = " ".join(capsys.readouterr().out.split())
    assert "(default: 100000)" in output
    assert "(default: 256)" in output
    assert "(default: 0.0001)" in output


def test_unknown_command_is_named():
    done = run("trian")
    assert done.returncode == 2
    assert "unknown command 'trian'" in done.stderr


def test_mistakes_are_one_line_without_a_traceback():
    for arguments, message in (
        (("train", "--dataset", "../x"), "malformed dataset id '../x'"),
        (("train", "--steps", "0"), "steps must be at least 1, not 0"),
        (("evaluate", "nowhere"), "nowhere"),
        (("train", "--resume", "nowhere"), "nowhere is not a run"),
    ):
        done = run(*arguments)
        assert done.returncode == 2, arguments
        assert done.stderr.startswith("minrl: error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_train_then_evaluate_from_the_command_line(hopper_id, tmp_path):
    path = tmp_path / "run"
    small = "--width 16 --num-layers 1 --steps 4 --eval-every 4 --eval-episodes 1 --device cpu"
    done = run(
        "train",
        *("--dataset", hopper_id, "--run-dir", str(path), "--final-episodes", "2"),
        *small.split(),
    )
    assert done.returncode == 0, done.stderr
    assert "last        4     3600" in done.stdout
    done = run(
        "evaluate",
        *(str(path), "--episodes", "2", "--targets", "1000", "2000", "--refresh-every", "1"),
        *("--video", str(tmp_path / "rollout.gif")),
    )
    assert done.returncode == 0, done.stderr
    assert "1000" in done.stdout
    assert (tmp_path / "rollout.gif").read_bytes().startswith(b"GIF8")
