"""Runs that take a second, studies of them, and what is left of one."""

import dataclasses
import subprocess
import sys
import time

from minrl.agents.checkpoint import CheckpointFolder, load_weights
from minrl.agents.model_config import ModelConfig
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import TrainConfig

SMALL = ModelConfig(width=16, num_layers=1)


def make_config(dataset, run_dir, **options):
    base = TrainConfig(
        dataset=(dataset,) if isinstance(dataset, str) else dataset,
        model=SMALL,
        steps=12,
        batch_size=8,
        eval_every=4,
        eval_episodes=2,
        final_episodes=2,
        log_every=5,
        device="cpu",
        run_dir=run_dir,
    )
    return dataclasses.replace(base, **options)


def start_study(folder, dataset, *flags, seeds, steps):
    """Start the command as a user would."""
    small = "width=16 num-layers=1 batch-size=8 eval-every=500 eval-episodes=0 final-episodes=0"
    grid = ["--tasks", dataset, "--backbones", "mingru", "--seeds", str(seeds)]
    settings = ["--set", *small.split(), "log-every=10", "device=cpu", f"steps={steps}"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "minrl", "study", "--folder", str(folder)),
            *(*grid, *settings, *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def assert_a_study_stops_and_saves(process, folder, number, seconds=120):
    """Send a signal to a study of three runs, of which two are at work at once.

    Args:
        process: From `start_study`.
        folder: Of the runs, that is, with the dataset.
        number: Of the signal.
        seconds: To wait for its start, and for its end.
    """
    paths = [folder / f"mingru-s{seed}" for seed in range(3)]
    wait_until(lambda: all(map(step_of, paths[:2])), seconds)
    process.send_signal(number)
    output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 130, errors
    assert "the same command goes on" in output
    assert not paths[2].exists()
    for path in paths[:2]:
        step = CheckpointFolder(path / "checkpoints").last()
        assert step >= step_of(path)
        assert f"stopped at step {step} and saved" in path.with_suffix(".log").read_text()


def wait_until(condition, seconds=120):
    """Wait for something that happens elsewhere; the machine may be busy."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def step_of(path):
    rows = RunFolder(path).read_metrics()
    return rows[-1]["step"] if rows else 0


def weights_of(path):
    folder = CheckpointFolder(path / "checkpoints")
    return load_weights(folder.weights(folder.last()))[0]


def losses_of(path):
    rows = RunFolder(path).read_metrics()
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
