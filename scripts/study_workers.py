"""The runs of a study in processes of this machine, a few at a time."""

import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from minrl.errors import INTERRUPTED
from minrl.scripts.study_run import log_of
from minrl.scripts.train_config import TrainConfig

LONGEST_LINE = 300  # characters


class LocalWorkers:
    """Carries out runs, each in a process of its own.

    Args:
        runs: What to carry out, in this order.
        workers: How many at a time.
        threads: Of PyTorch, for each.
    """

    def __init__(self, runs: Sequence[TrainConfig], workers: int, threads: int):
        self._waiting, self._workers, self._threads = deque(runs), workers, threads
        self.processes: list[tuple[TrainConfig, subprocess.Popen]] = []

    @property
    def running(self) -> list[TrainConfig]:
        """The runs at work now."""
        return [run for run, _ in self.processes]

    @property
    def is_busy(self) -> bool:
        """Whether there is work left."""
        return bool(self._waiting or self.processes)

    def poll(self) -> list[tuple[TrainConfig, str | None]]:
        """Start what there is room for; return the runs that ended, each with what went wrong."""
        ended = []
        for run, process in list(self.processes):
            if process.poll() is not None:
                self.processes.remove((run, process))
                process.stdin.close()
                ended.append((run, problem_of(run, process.returncode)))
        while self._waiting and len(self.processes) < self._workers:
            run = self._waiting.popleft()
            self.processes.append((run, self._start(run)))
        return ended

    def stop(self, at_once: bool = False) -> None:
        """Ask the runs at work to save and stop, and begin no more.

        Args:
            at_once: Whether to break off an evaluation while training. A final one always is.
        """
        self._waiting.clear()
        for _, process in self.processes:
            process.send_signal(signal.SIGINT if at_once else signal.SIGTERM)

    def _start(self, run: TrainConfig) -> subprocess.Popen:
        log = log_of(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "minrl.scripts.study_run"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(self._threads)},
                start_new_session=True,  # Ctrl-C comes to us alone, who pass it on, once
            )
        job = {"config": run.to_json(), "threads": self._threads}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()  # and left open: the process stops when it is closed
        return process


def problem_of(run: TrainConfig, status: int) -> str | None:
    """Say in a line why a process ended, None if its run is done."""
    if status == 0:
        return None
    line = last_line(log_of(run))
    if status == INTERRUPTED:
        return f"ended before it was done; last line: {line}"
    if status > 0:
        return line
    return f"killed by {signal.Signals(-status).name}; last line: {line}"


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty; a progress bar is as many as it shows."""
    lines = log.read_text(errors="replace").replace("\r", "\n").split("\n") if log.exists() else []
    return next((line.strip()[:LONGEST_LINE] for line in reversed(lines) if line.strip()), "")
