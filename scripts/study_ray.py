"""The runs of a study as tasks of a Ray cluster.

A task whose worker or node dies is given to another one, up to ``RETRIES`` times. The folders
of the study and of the datasets must be on a file system that all nodes share, under the same path:
there the run goes on from its last checkpoint, and there the progress is read. minrl must be
installed on every node.
"""

import contextlib
import os
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minrl.errors import AdapterError, ConfigError
from minrl.scripts import imports
from minrl.scripts.study_run import carry_out, log_of
from minrl.scripts.study_workers import last_line
from minrl.scripts.train_config import TrainConfig

RETRIES = 10
# Folder of the Minari datasets, and own modules.
PASSED_ON = ("MINARI_DATASETS_PATH", imports.VARIABLE)


class RayWorkers:
    """Carries out runs on a Ray cluster; as many at a time as it has room for.

    Args:
        runs: What to carry out, in this order.
        address: Of the cluster, or "auto".
        cpus: Cores for each run, and its threads.
        gpus: GPUs for each run.

    Raises:
        AdapterError: If Ray is not installed.
        ConfigError: If there is no cluster at the address.
    """

    def __init__(self, runs: Sequence[TrainConfig], address: str, cpus: int, gpus: float):
        self._ray = ray = connect(address)
        warn_of_too_little(ray.cluster_resources(), cpus, gpus)
        task = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_retries=RETRIES,
            max_calls=1,  # a process of its own for each run
        )(carry_out_with_log)
        variables = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        where = str(Path.cwd()), variables
        self._started = time.time()
        self._tasks = {task.remote(run.to_json(), cpus, *where): run for run in runs}

    @property
    def running(self) -> list[TrainConfig]:
        """The runs that have begun, as their logs tell."""
        logs = [(run, log_of(run)) for run in self._tasks.values()]
        return [run for run, log in logs if log.exists() and log.stat().st_mtime > self._started]

    @property
    def is_busy(self) -> bool:
        """Whether there is work left."""
        return bool(self._tasks)

    def poll(self) -> list[tuple[TrainConfig, str | None]]:
        """Return the runs that ended, each with what went wrong."""
        tasks = list(self._tasks)
        ended = self._ray.wait(tasks, num_returns=len(tasks), timeout=0)[0] if tasks else []
        return [(self._tasks.pop(task), self._problem_of(task)) for task in ended]

    def stop(self, at_once: bool = False) -> None:
        """Ask the runs at work to save and stop, and begin no more.

        Args:
            at_once: Whether to end them as they are.
        """
        for task in self._tasks:
            self._ray.cancel(task, force=at_once)

    def _problem_of(self, task: Any) -> str | None:
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayError as error:  # the worker or its node, not the run
            return (str(error).strip() or type(error).__name__).splitlines()[0]


def connect(address: str) -> Any:
    """Return the `ray` module, connected."""
    # Ray's own 20 tries are 13 minutes for the address that a dead cluster left behind.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
    except ImportError as error:
        raise AdapterError("--ray needs Ray: pip install ray") from error
    try:
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"no Ray cluster at {address!r}: {reason}") from error
    return ray


def warn_of_too_little(resources: dict[str, float], cpus: int, gpus: float) -> None:
    """Warn if no run fits into what the cluster has now; one that grows may have it later."""
    for name, wanted in (("CPU", cpus), ("GPU", gpus)):
        if resources.get(name, 0) < wanted:
            warnings.warn(
                f"each run asks for {wanted:g} {name}, the cluster has {resources.get(name, 0):g}: "
                "runs wait until it has more",
                stacklevel=3,
            )


def carry_out_with_log(
    values: dict[str, Any], threads: int, directory: str, variables: dict[str, str]
) -> str | None:
    """Carry out a run on a node of the cluster; return what went wrong, None if it is done.

    Args:
        values: Of the run's configuration, as JSON has them.
        threads: Of PyTorch.
        directory: Where relative paths start.
        variables: To set in the environment.
    """
    os.chdir(directory)
    os.environ.update(variables)
    run = TrainConfig.from_json(values)
    log_of(run).parent.mkdir(parents=True, exist_ok=True)
    with (
        log_of(run).open("a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            imports.import_named()
            return None if carry_out(run, threads) else "stopped by a signal"
        except Exception:
            traceback.print_exc()
    return last_line(log_of(run))
