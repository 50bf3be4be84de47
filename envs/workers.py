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
from minrl.envs.worker_process import pack, share_table
from minrl.errors import EnvError

_START_SECONDS = 60.0  # to import a simulator on a busy machine, whatever the timeout
_EXIT_SECONDS = 2.0
_LOOK_SECONDS = 0.2  # between looks at whether a silent process is still there
_NOW = 1e-3  # seconds; 0 would mean another thing to a socket
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


def _name(number: int) -> str:
    """Return the name of a signal; real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def portable_spec(environment_id: str) -> Any:
    """Return what another process has to know to make an environment, for JSON.

    Raises:
        EnvError: If the id is unknown, or the environment cannot be made elsewhere.
    """
    spec = find_spec(environment_id)
    maker = _importable_name(environment_id, spec.entry_point)
    spec = dataclasses.replace(spec, entry_point=maker, vector_entry_point=None)
    try:
        fields = dataclasses.asdict(spec)
        return pack(
            {field.name: fields[field.name] for field in dataclasses.fields(spec) if field.init}
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise EnvError(
            f"what {environment_id!r} is registered with cannot be handed to worker processes "
            f"({error}); register it with numbers, text, lists, tuples and dicts of them, or use "
            "num_workers=0"
        ) from error


class _Worker:
    """A process that holds the lanes of some rows."""

    def __init__(self, rows: range, memory: int) -> None:
        self.rows = rows
        self._received = b""
        self._socket, theirs = socket.socketpair()
        with theirs:
            link = theirs.fileno()
            self._process = subprocess.Popen(  # noqa: S603 - our own program, no shell
                [sys.executable, "-c", _PROGRAM, str(link), str(memory), *sys.path],
                stdin=subprocess.PIPE,  # nothing is written; its end tells of ours
                pass_fds=(link, memory),
                start_new_session=True,  # Ctrl-C is for the parent alone; and killed as a group
            )

    def ask(self, request: str) -> None:
        self._socket.settimeout(_START_SECONDS)
        self._socket.sendall(request.encode() + b"\n")

    def answer(self, deadline: float | None) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            EnvError: If what the worker says went wrong.
            OSError, EOFError: If there is no answer in time, or no worker any more.
        """
        while b"\n" not in self._received:
            ended = self._has_ended()  # what it has forked may hold the line open
            left = _LOOK_SECONDS if deadline is None else deadline - time.monotonic()
            self._socket.settimeout(_NOW if ended else min(max(left, _NOW), _LOOK_SECONDS))
            try:
                received = self._socket.recv(2**16)
            except TimeoutError:
                if ended:
                    raise EOFError from None
                if deadline is not None and time.monotonic() >= deadline:
                    raise
                continue
            if not received:
                raise EOFError
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
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

    def end(self, deadline: float) -> str:
        """Let the process leave until a deadline, end it and what it started; say how it did."""
        while not (left := self._has_ended()) and time.monotonic() < deadline:
            time.sleep(_NOW)
        # Before it is waited for, after which its number may be that of another group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_SECONDS)
        self._process.stdin.close()
        self._socket.close()
        if not left:
            return "broke off the connection"
        status = self._process.returncode
        return (
            f"ended with exit status {status}" if status >= 0 else f"was killed by {_name(-status)}"
        )

    def _has_ended(self) -> bool:
        if not hasattr(os, "waitid"):  # macOS before Python 3.13
            return self._process.poll() is not None
        try:
            states = os.WEXITED | os.WNOHANG | os.WNOWAIT
            return os.waitid(os.P_PID, self._process.pid, states) is not None
        except ChildProcessError:  # a parent that ignores SIGCHLD is told no more than this
            return True


class WorkerLanes:
    """As ``minrl.envs.lanes.Lanes``, in processes that hold several rows each.

    Args:
        environment_id: Registered in this process; what registered it is not run in the workers.
        num_workers: Processes; fewer if there are fewer rows.
        batch: Rows B.
        episodes: Number of episodes of all rows together.
        seed: The seed of episode e depends on (seed, e) alone.
        max_episode_steps: Truncate episodes here; None keeps the environment's own limit.
        timeout: Seconds that all rows of a worker together may take for a step; None for ever.

    Raises:
        EnvError: If the environment cannot be made, or not in another process.
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
            EnvError: If an environment or its process fails, or takes longer than the timeout; the
                message names it, the episode and the step. The other rows have their answers.
        """
        self._exchange(["start"] * len(self._workers), self._timeout)

    def step(self) -> None:
        """Take the actions of the table, and start the next episode where one ends.

        Raises:
            EnvError: As ``start``.
        """
        self._exchange(["step"] * len(self._workers), self._timeout)

    def close(self, patience: float | None = None) -> list[str]:
        """Close the environments and end the processes; return what went wrong.

        Args:
            patience: Seconds that closing may take; by default the timeout.
        """
        patience = self._timeout if patience is None else patience
        deadline = None if patience is None else time.monotonic() + patience
        problems, leave_by = [], 0.0  # at once, should we be interrupted
        try:
            for worker in self._workers:
                with contextlib.suppress(OSError):  # a dead one gives no answer either
                    worker.ask("close")
            for worker in list(self._workers):
                try:
                    problems += worker.closed(deadline)
                except (OSError, EOFError) as error:
                    problems.append(f"its process {self._lose(worker, error, patience)}")
            leave_by = time.monotonic() + _EXIT_SECONDS
        finally:
            for worker in self._workers:
                worker.end(leave_by)
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
                fate = self._lose(worker, error, timeout)
                failures.append(self._last_seen(worker, fate))
        if failures:
            raise failures[0]
        return answers

    def _lose(self, worker: _Worker, error: Exception, timeout: float | None) -> str:
        """Do without a worker that gives no answer; say what became of its process."""
        late = isinstance(error, TimeoutError)
        fate = worker.end(0.0 if late else time.monotonic() + _EXIT_SECONDS)
        self._workers.remove(worker)
        return f"gave no answer in {timeout:g} s" if late else fate

    def _last_seen(self, worker: _Worker, fate: str) -> EnvError:
        """Return what to tell of the rows of a worker that is lost."""
        rows = self.table[worker.rows.start : worker.rows.stop]
        if not len(rows):
            return EnvError(f"environment {self.name!r} cannot be made: its process {fate}")
        # The row that it was at; between two steps, any that still plays.
        row = rows[np.argmax((rows["doing"] > 0) + 0.5 * (rows["episode"] >= 0))]
        where = place(self.name, row)
        return EnvError(f"{where} is lost: its process {fate} while {activity(row)}")
