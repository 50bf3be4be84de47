"""``minrl study``: the same training runs for every task, method and seed, on one machine or many.

Each run is an ordinary run of ``minrl train``, in FOLDER/DATASET/METHOD-sSEED. The command can be
stopped and started again as often as one likes: finished runs are not repeated, others go on from
their last checkpoint, to the same weights.
"""

import time

from minrl.errors import INTERRUPTED
from minrl.scripts.study_grid import StudyConfig, runs_of
from minrl.scripts.study_progress import Progress
from minrl.scripts.study_ray import RayWorkers
from minrl.scripts.study_run import is_done
from minrl.scripts.study_workers import LocalWorkers
from minrl.scripts.train_config import TrainConfig
from minrl.scripts.train_processes import interruption

FAILED = 1
SECONDS_BETWEEN_LOOKS = 0.5


def study(config: StudyConfig) -> int:
    """Train every method on every task with every seed; what is there already is not repeated.

    Args:
        config: The grid and where to run it.

    Returns:
        The exit status: 0, 1 if a run failed, 130 if it was interrupted.
    """
    runs = runs_of(config)
    missing = [run for run in runs if not is_done(run)]
    progress = Progress(runs, missing, config.folder)
    if not missing:
        return 0
    workers = make_workers(config, missing)
    with interruption() as asked:
        try:
            work(workers, progress, asked)
        finally:  # after a second Ctrl-C, or a fault of ours: no process is left behind
            if workers.is_busy:
                workers.stop(at_once=True)
                wait_for(workers, progress)
    progress.close()
    if asked:
        progress.say("stopped; the same command goes on")
        return INTERRUPTED
    return FAILED if progress.failed else 0


def make_workers(config: StudyConfig, runs: list[TrainConfig]) -> LocalWorkers | RayWorkers:
    """Return who carries out the runs."""
    if config.ray:
        return RayWorkers(runs, config.ray, config.cpus, config.gpus)
    return LocalWorkers(runs, config.workers, config.cpus)


def work(workers: LocalWorkers | RayWorkers, progress: Progress, asked: list[int]) -> None:
    """Look after the workers until all runs ended, or stop them when it is asked for."""
    while workers.is_busy and not asked:
        for run, problem in workers.poll():
            progress.ended(run, problem)
        progress.show(workers.running)
        if workers.is_busy:
            time.sleep(SECONDS_BETWEEN_LOOKS)
    if workers.is_busy:
        progress.say(
            "stopping: the runs at work save, final evaluations are made again later; again to "
            "break off all evaluations"
        )
        workers.stop()
        wait_for(workers, progress)


def wait_for(workers: LocalWorkers | RayWorkers, progress: Progress) -> None:
    """Wait until the runs that were asked to stop have done so, or were done before."""
    while workers.is_busy:
        for run, problem in workers.poll():
            if problem is None:  # the others were stopped, which is no failure
                progress.ended(run, None)
        time.sleep(SECONDS_BETWEEN_LOOKS)
