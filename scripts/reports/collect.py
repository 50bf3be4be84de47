"""Runs as a report sees them, read from the folders that training and outside agents leave."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from minrl.agents.agent_header import build_model, check_info
from minrl.agents.checkpoint import is_finite_number, load_weights
from minrl.agents.files import read_text
from minrl.envs.scores import reference_scores
from minrl.errors import CheckpointError, ConfigError, EnvError
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import TrainConfig, flatten

RUN_FILE, PEER_FILE = "config.json", "peer.json"


@dataclass
class Run:
    """One finished run.

    Attributes:
        path: Where it is; None if it was read from a report.json.
        folder: The same below the folder that was asked for.
        datasets: Ids, those of a union one by one.
        environment: Gymnasium id, None if not known.
        seed: Of the training.
        steps: Training steps.
        targets: Returns asked for, the one that scores are at first; None is "asks for none".
        refresh_every: How it acts, see ``DecisionAgent``; None for outside agents.
        evaluations: Of these targets: checkpoint, step, refresh_every, target, episodes, seed,
            return_mean, return_std, and score, in percent of reference returns if there are any.
        curve: By target the evaluations while training: "steps", "return" and "score".
        step_seconds: Of a training step; None if not known.
        parameters: Of the model; None if not known.
        references: Returns that score 0 and 100 percent; None if not known.
        score_note: What its scores may be compared with.
        data: Digest of what it was trained on, if known.
        versions: Of libraries, by name.
        machine: That it was trained on, if known.
        library: Whose code it is; None for ours.
        note: What its author says of it.
        settings: Everything it was configured with, in one level; empty for outside agents.
        agent: What its author calls it; empty for ours.
        method: The name it goes by in the report.
    """

    path: Path | None
    folder: str
    datasets: tuple[str, ...]
    environment: str | None
    seed: int
    steps: int
    targets: tuple[float | None, ...]
    refresh_every: int | None
    evaluations: list[dict[str, Any]]
    curve: dict[str, dict[str, list]] = field(default_factory=dict)
    step_seconds: float | None = None
    parameters: int | None = None
    references: tuple[float, float] | None = None
    score_note: str | None = None
    data: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: str | None = None
    library: str | None = None
    note: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    agent: str = ""
    method: str = ""


class LeftOut(Exception):  # noqa: N818 - it is an answer, not an error
    """A folder that is no finished run; the message says why."""


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[dict[str, str]]]:
    """Read all runs in and below the folders.

    Returns:
        The finished runs, and for each folder left out its "folder" and the "reason".

    Raises:
        ConfigError: If a folder does not exist, or no finished run is found.
    """
    runs, left_out, seen = [], [], set()
    for root in folders:
        if not root.is_dir():
            raise ConfigError(f"there is no folder or report.json at {root}")
        for path in sorted([*root.rglob(RUN_FILE), *root.rglob(PEER_FILE)]):
            if path.resolve() in seen:  # the given folders may hold one another
                continue
            seen.add(path.resolve())
            name = path.parent.relative_to(root).as_posix()
            name = root.resolve().name if name == "." else name
            try:
                runs.append(read_run(path.parent, name))
            except LeftOut as reason:
                left_out.append({"folder": name, "reason": str(reason)})
    if not runs:
        reasons = "".join(f"\n  {item['folder']}: {item['reason']}" for item in left_out)
        raise ConfigError(f"no finished run in {', '.join(map(str, folders))}{reasons}")
    return runs, left_out


def read_run(path: Path, name: str) -> Run:
    """Read a run of ours or of an outside agent.

    Raises:
        LeftOut: If it is not finished, or cannot be read.
    """
    try:
        run = _read_peer(path, name) if (path / PEER_FILE).exists() else _read_ours(path, name)
    except LeftOut:
        raise
    except Exception as error:  # of many kinds: anything may be in the files of a stranger
        raise LeftOut(f"cannot be read: {type(error).__name__}: {error}") from error
    if run.references is None and run.environment is not None:
        with contextlib.suppress(EnvError):
            run.references = reference_scores(run.environment)
    return run


def _read_ours(path: Path, name: str) -> Run:
    folder = RunFolder(path)
    config = folder.read_config()
    rows = folder.read_metrics()
    reached = max((row["step"] for row in rows), default=0)
    lines = folder.read_evaluations()
    if reached < config.steps and (rows or not lines):
        raise LeftOut(f"stopped at step {reached} of {config.steps}")
    evaluations = _choose(lines, config, _best_step(rows, lines, config))
    if not evaluations:
        raise LeftOut("has no final evaluation at its last step: run minrl evaluate on it")
    run = Run(
        path=path,
        folder=name,
        datasets=_each(config.dataset),
        environment=config.environment,
        seed=config.seed,
        steps=config.steps,
        targets=config.targets,
        refresh_every=config.refresh_every,
        evaluations=evaluations,
        curve=_learning_curve(rows, config),
        step_seconds=_step_seconds(rows),
        settings=flatten(config),
    )
    _read_checkpoint(folder, run)
    return run


def _read_checkpoint(folder: RunFolder, run: Run) -> None:
    """Fill in what only checkpoints tell, as far as there are any and they are sound."""
    steps = folder.checkpoints.steps()
    if not steps:
        return
    with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
        header = folder.checkpoints.header(steps[-1])
        check_info(header)
        dataset, machine = header["dataset"], header.get("trained_on")
        run.score_note = dataset["score_note"]
        run.data = dataset.get("sha256")
        run.machine = None if machine is None else str(machine)
        run.versions = {str(name): str(version) for name, version in header["versions"].items()}
        lowest, highest = dataset.get("reference_min"), dataset.get("reference_max")
        run.references = None if None in (lowest, highest) else (lowest, highest)
    with contextlib.suppress(Exception):  # of many kinds, where they do not fit each other
        tensors, header = load_weights(folder.checkpoints.weights(steps[-1]))
        model = build_model(header["model"], tensors)
        run.parameters = sum(parameter.numel() for parameter in model.parameters())


def _best_step(rows: list[dict], lines: list[dict], config: TrainConfig) -> int | None:
    """Return the step with the highest return while training, the latest of equals.

    Read from the metrics, since "best" in the evaluations is not repeated where it is the last. A
    step counts, there as here, if all targets were scored.
    """
    tags = [f"eval/{target:g}/return_mean" for target in config.targets]
    by_target = [{row["step"]: row[tag] for row in rows if tag in row} for tag in tags]
    scored = [(by_target[0][step], step) for step in set.intersection(*map(set, by_target))]
    if scored:
        return max(scored)[1]
    best = [line["step"] for line in lines if line["checkpoint"] == "best"]
    return best[-1] if best else None


def _choose(lines: list[dict], config: TrainConfig, best_step: int | None) -> list[dict[str, Any]]:
    """Return one evaluation for each checkpoint, target and way of acting.

    That on the start states of the protocol, else the largest, else the latest. Evaluations of
    other environments, targets and steps than the run's are other experiments.
    """

    def rank(evaluation: dict[str, Any]) -> tuple[bool, int]:
        return evaluation["seed"] == config.final_seed, evaluation["episodes"]

    chosen: dict[tuple, dict[str, Any]] = {}
    for checkpoint, step in (("last", config.steps), ("best", best_step)):
        for line in lines:
            acting = line.get("refresh_every")
            acting = config.refresh_every if acting is None else acting
            of_this_run = line["step"] == step and line["target_return"] in config.targets
            if of_this_run and line["environment_id"] == config.environment:
                key = (checkpoint, line["target_return"], acting)
                if key not in chosen or rank(line) >= rank(chosen[key]):
                    chosen[key] = _summarise(line, checkpoint, acting)
    has_last = any(checkpoint == "last" for checkpoint, *_ in chosen)
    return list(chosen.values()) if has_last else []


def _summarise(line: dict, checkpoint: str, refresh_every: int | None) -> dict[str, Any]:
    numbers = ("step", "episodes", "seed", "return_mean", "return_std")
    evaluation = {
        "checkpoint": checkpoint,
        "refresh_every": refresh_every,
        "target": line["target_return"],
        **{name: line[name] for name in numbers},
        "score": line["normalized"]["mean"] if line["normalized"] else None,
    }
    check_evaluation(evaluation)
    return evaluation


def check_evaluation(evaluation: dict[str, Any]) -> None:
    """Refuse an evaluation of a run that statistics cannot be made of.

    Raises:
        ValueError: Names what is not a finite number, or no way to choose or ask.
    """
    if evaluation["checkpoint"] not in ("last", "best"):
        raise ValueError(f"checkpoint of an evaluation is {evaluation['checkpoint']!r:.50}")
    for name in ("target", "refresh_every"):
        if evaluation[name] is not None and not is_finite_number(evaluation[name]):
            raise ValueError(f"{name} of an evaluation is {evaluation[name]!r:.50}")
    for name in ("step", "episodes", "seed", "return_mean", "return_std", "score"):
        value = evaluation[name]
        # The spread of a single episode is not known, nor a score without references.
        is_unknown = value is None and name in ("return_std", "score")
        if not (is_finite_number(value) or is_unknown):
            raise ValueError(f"{name} of an evaluation is {value!r:.50}")


def _learning_curve(rows: list[dict], config: TrainConfig) -> dict[str, dict[str, list]]:
    """Return the evaluations of each target, each at steps of its own: some may have failed."""
    curve = {}
    for target in config.targets:
        tag = f"eval/{target:g}"
        evaluated = {row["step"]: row for row in rows if f"{tag}/return_mean" in row}
        ordered = [evaluated[step] for step in sorted(evaluated)]
        if ordered:
            curve[f"{target:g}"] = {
                "steps": sorted(evaluated),
                "return": [row[f"{tag}/return_mean"] for row in ordered],
                "score": [row.get(f"{tag}/normalized_score_mean") for row in ordered],
            }
    return curve


def _step_seconds(rows: list[dict]) -> float | None:
    """Return the median time of a step, from the speeds logged on the way.

    Where the machine stood still or was lent to others, their mean would be of that.
    """
    timed = {
        row["step"]: row["time/steps_per_s"] for row in rows if row.get("time/steps_per_s", 0) > 0
    }
    if not timed:
        return None
    steps = np.array(sorted(timed))
    seconds, counts = 1 / np.array([timed[step] for step in steps]), np.diff(steps, prepend=0)
    order = np.argsort(seconds)
    seconds, passed = seconds[order], np.cumsum(counts[order])
    # Of n steps in order the middle one, or the two of it, as if each were written out.
    middle = np.array([(passed[-1] - 1) // 2, passed[-1] // 2])
    return float(seconds[np.searchsorted(passed, middle, side="right")].mean())


def _read_peer(path: Path, name: str) -> Run:
    peer = json.loads(read_text(path / PEER_FILE))
    evaluations = [_summarise(line, line["checkpoint"], None) for line in peer["evaluations"]]
    if not any(evaluation["checkpoint"] == "last" for evaluation in evaluations):
        raise LeftOut("has no evaluation of its last step")
    datasets = peer["dataset"]
    return Run(
        path=path,
        folder=name,
        datasets=_each([datasets] if isinstance(datasets, str) else datasets),
        environment=peer["evaluations"][0]["environment_id"],
        seed=peer["seed"],
        steps=peer["steps"],
        targets=tuple(dict.fromkeys(evaluation["target"] for evaluation in evaluations)),
        refresh_every=None,
        evaluations=evaluations,
        step_seconds=peer["seconds"] / peer["steps"] if peer.get("seconds") else None,
        parameters=peer.get("parameters"),
        data=peer.get("data"),
        library=peer["library"],
        note=peer.get("note", ""),
        agent=peer["method"],
    )


def _each(datasets: Sequence[str]) -> tuple[str, ...]:
    """Return the ids one by one, where some may be joined with "+"."""
    return tuple("+".join(datasets).split("+"))


def headline(run: Run, checkpoint: str, refresh_every: int | None = None) -> dict[str, Any] | None:
    """Return the evaluation that stands for a run: at its first target, acting as trained.

    Args:
        run: The run.
        checkpoint: "last" or "best".
        refresh_every: Another way to act than the trained one.

    Returns:
        None if it was not evaluated so.
    """
    acting = run.refresh_every if refresh_every is None else refresh_every
    wanted = checkpoint, acting, run.targets[0]
    for evaluation in run.evaluations:
        if (evaluation["checkpoint"], evaluation["refresh_every"], evaluation["target"]) == wanted:
            return evaluation
    return None
