import dataclasses
import json

import numpy as np
import pytest

from minrl.envs.evaluation import Evaluation
from minrl.envs.scores import REFERENCE_SCORES
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import quick

ENVIRONMENTS = {"hopper": "Hopper-v5", "walker2d": "Walker2d-v5"}


def run_writer(root):
    """Return what writes a run without training it: score(step) is what its evaluations find."""

    def write(
        name="mingru-s0",
        score=lambda step: 10.0 * step,
        *,
        dataset="minrl/hopper/medium-v0",
        backbone="mingru",
        model=None,
        also=(),
        **settings,
    ):
        robot = dataset.split("/")[1]
        settings = {
            "steps": 4,
            "eval_every": 2,
            "environment": ENVIRONMENTS[robot],
            "targets": (3600.0, 1800.0),
            "run_dir": root / dataset / name,
        } | settings
        config = dataclasses.replace(quick((dataset,), backbone), **settings)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model or {}))
        run = RunFolder.create(config)
        rows = [{"step": step, "time/steps_per_s": 2.0} for step in range(1, config.steps + 1)]
        for step in range(2, config.steps + 1, 2):
            for target in config.targets:
                reached = score(step) * target / 3600.0
                found = evaluate(robot, target, reached, 10_000 + config.seed)
                rows.append({"step": step, f"eval/{target:g}/return_mean": found.return_mean})
                rows[-1][f"eval/{target:g}/normalized_score_mean"] = reached
        run.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        best = max(range(2, config.steps + 1, 2), key=lambda step: (score(step), step))
        lines = [
            line(robot, config, checkpoint, step, target, score(step) * target / 3600.0)
            for checkpoint, step in (("last", config.steps), ("best", best))
            for target in config.targets
            if checkpoint == "last" or step != config.steps
        ]
        lines += [line(robot, config, *values) for values in also]
        with (run.path / "evaluations.jsonl").open("w") as file:
            file.writelines(json.dumps(values) + "\n" for values in lines)
        return run.path

    return write


def evaluate(robot, target, score, seed, episodes=3):
    lowest, highest = REFERENCE_SCORES[robot]
    returns = np.full(episodes, lowest + (highest - lowest) * score / 100.0)
    return Evaluation(ENVIRONMENTS[robot], target, returns, np.full(episodes, 9), seed)


def line(robot, config, checkpoint, step, target, score, refresh_every=None, episodes=3):
    acting = config.refresh_every if refresh_every is None else refresh_every
    found = evaluate(robot, target, score, 20_000 + config.seed, episodes)
    head = {"checkpoint": checkpoint, "step": step, "refresh_every": acting}
    return head | found.to_dict()


def peer_writer(root):
    """Return what writes the run of an outside agent."""

    def write(
        name,
        score,
        *,
        method="d3rlpy IQL",
        dataset="minrl/hopper/medium-v0",
        seed=0,
        steps=500,
        data=None,
    ):
        folder = root / dataset / name
        folder.mkdir(parents=True)
        found = evaluate(dataset.split("/")[1], None, score, 20_000 + seed).to_dict()
        peer = {
            "method": method,
            "library": "d3rlpy 2.8.1",
            "dataset": [dataset],
            "seed": seed,
            "data": data,
            "steps": steps,
            "seconds": 12.5,
            "parameters": 1234,
            "note": "",
            "evaluations": [{"checkpoint": "last", "step": steps, **found}],
        }
        (folder / "peer.json").write_text(json.dumps(peer))
        return folder

    return write


@pytest.fixture(scope="session")
def writers():
    """Make, for a folder, what writes runs and outside agents' runs into it."""
    return lambda root: (run_writer(root), peer_writer(root))


@pytest.fixture
def write_run(writers, tmp_path):
    """Write a run into the test's folder."""
    return writers(tmp_path)[0]


@pytest.fixture
def write_peer(writers, tmp_path):
    """Write an outside agent's run into the test's folder."""
    return writers(tmp_path)[1]
