"""One run of a study in a process of its own: begun, continued, or only evaluated.

    python -m minrl.scripts.study_run

reads the configuration from the first line of its standard input and works until it is done, or
until that input ends because the process that started it is gone: then it saves and stops.
"""

import dataclasses
import json
import os
import signal
import sys
import threading
from pathlib import Path

import torch
from filelock import FileLock

from minrl.errors import INTERRUPTED, CheckpointError, ConfigError
from minrl.scripts.imports import import_named
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.study_grid import refuse_other_settings
from minrl.scripts.train import train
from minrl.scripts.train_config import TrainConfig

KEY = ("checkpoint", "step", "target_return")


def log_of(config: TrainConfig) -> Path:
    """Return where the output of a run goes: beside its folder, which `train` wants for itself."""
    return config.run_dir.with_name(f"{config.run_dir.name}.log")


def is_done(config: TrainConfig) -> bool:
    """Tell whether a run is trained to its last step, scored, evaluated and drawn.

    It goes by what is in the folder, each file written whole or later than what it says is done,
    so the answer holds wherever the process was killed.
    """
    run = RunFolder(config.run_dir)
    try:
        if not (run.path / "config.json").exists() or last_step(run) < config.steps:
            return False
        config = as_begun(config, run)
        if not run.was_evaluated(config, last_step(run)):
            return False
        if not (config.environment and config.final_episodes):
            return (run.path / "learning_curve.png").exists()
        found = {tuple(row[name] for name in KEY) for row in final_evaluations(run, config)}
        drawn = run.path / "target_vs_return.png"
        return keys_of_final_evaluations(run, config) <= found and drawn.exists()
    except (CheckpointError, ConfigError):  # damaged: whoever carries it out will say how
        return False


def carry_out(config: TrainConfig, threads: int = 1) -> bool:
    """Do what is missing of a run, alone on its folder; return whether it is done.

    Args:
        config: Of the run, with its folder.
        threads: Of PyTorch.

    Raises:
        ConfigError: If a run with other settings is in the folder, by now.
    """
    torch.set_num_threads(threads)
    run = RunFolder(config.run_dir)
    run.path.parent.mkdir(parents=True, exist_ok=True)
    # Somebody may be at work on it: another study, or what is left of one that was killed.
    with FileLock(run.path.with_name(f"{run.path.name}.lock"), poll_interval=0.5):
        refuse_other_settings(config)
        if is_done(config):
            return True
        if (run.path / "config.json").exists():
            # The study's folder may have been moved since.
            train(dataclasses.replace(config, run_dir=None), resume=run.path)
        else:
            train(config)
        return is_done(config)


def as_begun(config: TrainConfig, run: RunFolder) -> TrainConfig:
    """Return the configuration in the folder, where the data has filled in targets and so on."""
    return dataclasses.replace(run.read_config(), final_episodes=config.final_episodes)


def last_step(run: RunFolder) -> int:
    """Return the step of the newest sound checkpoint, 0 if there is none yet."""
    return run.checkpoints.last() if run.checkpoints.steps() else 0


def keys_of_final_evaluations(run: RunFolder, config: TrainConfig) -> set[tuple]:
    """Return what `KEY` names of each evaluation that the run has at its end."""
    steps = {run.checkpoints.best(): "best"}
    steps[run.checkpoints.last()] = "last"  # where they are the same it is called last
    return {(name, step, target) for step, name in steps.items() for target in config.targets}


def final_evaluations(run: RunFolder, config: TrainConfig) -> list[dict]:
    """Return the evaluations so far that are made as those at the end of the run are."""
    made_as = {
        "environment_id": config.environment,
        "episodes": config.final_episodes,
        "refresh_every": config.refresh_every,
        "seed": config.final_seed,
    }
    rows = [row for row in run.read_evaluations() if row["target_return"] in config.targets]
    return [row for row in rows if made_as.items() <= row.items()]


def stop_with_parent() -> None:
    """Ask this process to save and stop when its standard input ends."""

    def wait_for_the_end() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait_for_the_end, daemon=True).start()


def main() -> int:
    """Carry out the run described on standard input; return the exit status."""
    job = json.loads(sys.stdin.readline())
    stop_with_parent()
    import_named()
    return 0 if carry_out(TrainConfig.from_json(job["config"]), job["threads"]) else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
