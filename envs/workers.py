"""Lanes in worker processes: an environment that hangs or crashes takes nothing else with it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import numpy as np

from minrl.envs.lanes import activity, new_row_type, place
from minrl.envs.make import find_spec
from minrl.envs.worker_process import share_table
from minrl.errors import EnvError

_START_SECONDS = 60.0  # to import a simulator on a busy machine, whatever the timeout
_EXIT_SECONDS = 2.0
# Not python -m, which would look for modules where the parent does not.
_PROGRAM = """
import sys
link, memory, *sys.path = sys.argv[1:]
from minrl.envs.worker_process import main
main(int(link), int(memory))
"""


def _importable_name(environment_id: str, maker: Any) -> str:
    """Return the ``module:name`` that another process can find a maker of environments by."""
    if isinstance(maker, str):
        return maker
    module, name = getattr(maker, "__module__", ""), getattr(maker, "__qualname__", "")
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not maker:
        raise EnvError(
            f"worker processes cannot import what makes {environment_id!r} ({maker!r}); put it at "
            "the top level of a module, or use num_workers=0"
        )
    return f"{module}:{name}"


def portable_spec(environment_id: str) -> str:
    """Return, as JSON, what another process has to know to make an environment.

    Raises:
        EnvError: the id is unknown, or the environment cannot be made elsewhere.
    """
    spec = find_spec(environment_id)
    entry_point = _importable_name(environment_id, spec.entry_point)
    try:
        return dataclasses.replace(spec, entry_point=entry_point, vector_entry_point=None).to_json()
    except (TypeError, ValueError) as error:
        raise EnvError(
            f"what {environment_id!r} is registered with cannot be handed to worker processes "
            f"({error}); use num_workers=0"
        ) from error


class _Worker:
    """A process that holds the lanes of some rows."""

    def __init__(self, rows: range, memory: int) -> None:
        self.rows = rows
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(_START_SECONDS)
        self._stream = self._socket.makefile("rwb")
        with theirs:
            link = theirs.fileno()
            self._process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                [sys.executable, "-c", _PROGRAM, str(link), str(memory), *sys.path],
                stdin=subprocess.PIPE,  # nothing is written; its end tells of ours
                pass_fds=(link, memory),
                start_new_session=True,  # Ctrl-C is for the parent alone; and killed as a group
            )

    def ask(self, request: str) -> None:
        self._stream.write(request.encode() + b"\n")
        self._stream.flush()

    def answer(self, deadline: float | None) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            EnvError: what the worker says went wrong.
            OSError, EOFError: there is no answer in time, or no worker any more.
        """
        left = None if deadline is None else max(deadline - time.monotonic(), 1e-3)
        self._socket.settimeout(left)
        line = self._stream.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        message = json.loads(line)
        if message["error"] is not None:
            raise EnvError(message["error"])
        return message

    def closed(self, deadline: float | None) -> list[str]:
        """Wait for the answer to "close": what went wrong with the environments."""
        while True:  # earlier answers come first, if we were interrupted
            with contextlib.suppress(EnvError):
                message = self.answer(deadline)
                if "problems" in message:
                    return message["problems"]

    def wait(self, seconds: float) -> str:
        """Wait for a process that is leaving; say how it did."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "broke off the connection"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended with exit status {status}"

    def kill(self) -> None:
        """End the process and what it started, whatever they are doing."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        self._process.stdin.close()
        with contextlib.suppress(OSError):  # what could not be sent
            self._stream.close()
        self._socket.close()


class WorkerLanes:
    """As `minrl.envs.lanes.Lanes`, in processes that hold several rows each.

    Args:
        environment_id: registered in this process; what registered it is not run in the workers.
        num_workers: processes; fewer if there are fewer rows.
        batch: rows B.
        episodes: number of episodes of all rows together.
        seed: the seed of episode e depends on (seed, e) alone.
        max_episode_steps: truncate episodes here; None keeps the environment's own limit.
        timeout: seconds that all rows of a worker together may take for a step; None for ever.

    Raises:
        EnvError: the environment cannot be made, or not in another process.
    """

    def __init__(
        self,
        environment_id: str,
        *,
        num_workers: int,
        batch: int,
        episodes: int,
        seed: int,
        max_episode_steps: int | None,
        timeout: float | None,
    ) -> None:
        if os.name != "posix":
            raise EnvError("worker processes need Linux or macOS; use num_workers=0")
        job = {
            "spec": portable_spec(environment_id),
            "batch": batch,
            "episodes": episodes,
            "seed": seed,
            "max_episode_steps": max_episode_steps,
        }
        self.table, self.name, self._timeout = np.zeros(0), environment_id, timeout
        self._workers: list[_Worker] = []
        self._memory = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the rest
        count = min(num_workers, batch)
        try:
            for first, end in pairwise(batch * worker // count for worker in range(count + 1)):
                self._workers.append(_Worker(range(first, end), self._memory.fileno()))
            answers = self._exchange(
                [
                    json.dumps({**job, "first_row": worker.rows[0], "count": len(worker.rows)})
                    for worker in self._workers
                ],
                None if timeout is None else max(timeout, _START_SECONDS),
            )
            row_type = new_row_type(*answers[0]["sizes"])
            self._memory.write(bytes(batch * row_type.itemsize))  # a full disk is noticed here
            self._memory.flush()
            self.table = share_table(self._memory.fileno(), row_type, batch)
            self.table["episode"] = np.arange(batch)  # should a worker be lost before it starts
        except BaseException:
            self.close(0.0)
            raise

    def start(self) -> None:
        """Start every row's first episode.

        Raises:
            EnvError: an environment or its process fails, or takes longer than the timeout; the
                message names it, the episode and the step. The other rows have their answers.
        """
        self._exchange(["start"] * len(self._workers), self._timeout)

    def step(self) -> None:
        """Take the actions of the table, and start the next episode where one ends.

        Raises:
            EnvError: as `start`.
        """
        self._exchange(["step"] * len(self._workers), self._timeout)

    def close(self, patience: float | None = None) -> list[str]:
        """Close the environments and end the processes; return what went wrong.

        Args:
            patience: seconds that closing may take; by default the timeout.
        """
        patience = self._timeout if patience is None else patience
        deadline = None if patience is None else time.monotonic() + patience
        problems = []
        try:
            for worker in self._workers:
                with contextlib.suppress(OSError):  # a dead one gives no answer either
                    worker.ask("close")
            leaving = []
            for worker in self._workers:
                try:
                    problems += worker.closed(deadline)
                    leaving.append(worker)
                except TimeoutError:
                    problems.append(f"no answer in {patience:g} s; its process was killed")
                except (OSError, EOFError):
                    problems.append(f"its process {worker.wait(_EXIT_SECONDS)}")
            deadline = time.monotonic() + _EXIT_SECONDS
            for worker in leaving:
                worker.wait(max(deadline - time.monotonic(), 0.0))
        finally:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()
            self._memory.close()
        return problems

    def _exchange(self, requests: list[str], timeout: float | None) -> list[dict[str, Any]]:
        """Give each worker its request and return the answers, or raise the first failure."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for worker, request in zip(self._workers, requests, strict=True):
            with contextlib.suppress(OSError):  # a dead one gives no answer either
                worker.ask(request)
        answers, failures = [], []
        for worker in list(self._workers):
            try:
                answers.append(worker.answer(deadline))
            except EnvError as error:
                failures.append(error)
            except (OSError, EOFError) as error:
                failures.append(self._lose(worker, error, timeout))
        if failures:
            raise failures[0]
        return answers

    def _lose(self, worker: _Worker, error: Exception, timeout: float | None) -> EnvError:
        """Do without a worker that gives no answer; return what to tell about it."""
        late = isinstance(error, TimeoutError)
        fate = f"gave no answer in {timeout:g} s" if late else worker.wait(_EXIT_SECONDS)
        worker.kill()
        self._workers.remove(worker)
        rows = self.table[worker.rows.start : worker.rows.stop]
        if not len(rows):
            return EnvError(f"environment {self.name!r} cannot be made: its process {fate}")
        # The row that it was at; between two steps, any that still plays.
        row = rows[np.argmax((rows["doing"] > 0) + 0.5 * (rows["episode"] >= 0))]
        where = place(self.name, row)
        return EnvError(f"{where} is lost: its process {fate} while {activity(row)}")
