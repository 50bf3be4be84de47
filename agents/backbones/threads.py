"""One kernel on several threads, which Ctrl-C can neither hang nor cut loose."""

import contextlib
import functools
import itertools
import os
import queue
import threading
from collections.abc import Callable

import torch


def run_parallel(kernel: Callable, arguments: tuple, units: int, *, least: int = 1) -> None:
    """Call ``kernel(*arguments, first, stop)`` over the ranges of ``units``, one for each thread.

    Args:
        kernel: From :func:`minrl.agents.backbones.native.load_kernels`; its last two arguments are
            the range to work on.
        arguments: The others.
        units: Pieces of work, independent of each other.
        least: Units below which another thread is not worth waking.
    """
    threads = max(1, min(torch.get_num_threads(), units // max(least, 1)))
    bounds = [units * thread // threads for thread in range(threads + 1)]
    jobs = [_Job(kernel, (*arguments, *bound)) for bound in itertools.pairwise(bounds[1:])]
    errors = []
    try:
        for job in jobs:
            _queue().put(job)
        kernel(*arguments, bounds[0], bounds[1])
        for job in jobs:  # those that no thread has begun: all are busy, or there are none
            job.run("caller")
    finally:
        # Even through Ctrl-C: the threads write to memory that the caller would free. Not in a
        # function of its own: Ctrl-C can come between its call and its first line.
        waiting = True
        while waiting:
            try:
                for job in jobs:
                    job.wait()
                waiting = False
            except BaseException as error:
                errors.append(error)
    errors += [job.error for job in jobs if job.error is not None]
    if errors:
        raise errors[0]


class _Job:
    """One thread's range of a kernel.

    Not a future of the standard library: those are handed over under locks which Ctrl-C, where it
    comes at the wrong moment, leaves held for ever, or loses the future while its thread runs. Here
    every step is a single call into C, which Ctrl-C comes before or after, and its outcome can be
    read again.
    """

    def __init__(self, kernel: Callable, arguments: tuple) -> None:
        self.kernel = kernel
        self.arguments = arguments
        self.owner: dict[str, str] = {}  # "name": whoever was first to ask for it
        self.error: BaseException | None = None
        self.done = False
        self.running = threading.Lock()
        self.running.acquire()

    def run(self, name: str) -> None:
        """Run it under ``name``, unless it is another's."""
        if self.owner.setdefault("name", name) != name:
            return
        try:
            self.kernel(*self.arguments)
        except BaseException as error:
            self.error = error
        self.done = True
        self.running.release()

    def wait(self) -> None:
        """Return once no thread runs it or ever will."""
        while self.owner.setdefault("name", "nobody") == "thread" and not self.done:
            self.running.acquire()


@functools.cache
def _queue() -> queue.SimpleQueue:
    """Return the jobs that this process's threads wait for."""
    jobs: queue.SimpleQueue = queue.SimpleQueue()

    def work() -> None:
        while True:
            jobs.get().run("thread")

    with contextlib.suppress(RuntimeError):  # the main thread has ended, or there are too many
        for _ in range(max(1, (os.cpu_count() or 1) - 1)):
            threading.Thread(target=work, name="minrl", daemon=True).start()
    return jobs


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_queue.cache_clear)
