"""The processes that train: those of ``torchrun``, and the signals that stop them."""

import contextlib
import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

from minrl.data.episodes import Episodes
from minrl.data.minari_source import load_dataset
from minrl.scripts.train_config import TrainConfig


def load_first_on_rank_zero(config: TrainConfig, rank: int) -> Episodes:
    """Load the data, on one process before the others, since that may mean to make it."""
    if rank != 0:
        dist.barrier()
    episodes = load_dataset(config.dataset, on_bad_episode=config.on_bad_episode)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    return episodes


@contextlib.contextmanager
def distributed_processes(device: str) -> Iterator[int]:
    """Join the other processes if ``torchrun`` started this one; give this one's rank."""
    if not dist.is_torchelastic_launched():
        yield 0
        return
    backend = "gloo"
    if torch.cuda.is_available() and device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    # The others wait while the first makes the data and evaluates; torchrun ends them if it dies.
    dist.init_process_group(backend, timeout=timedelta(hours=6))
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def interruption() -> Iterator[list[int]]:
    """Give a list that becomes true at Ctrl-C or SIGTERM; Ctrl-C after that interrupts at once.

    SIGTERM may come more than once, from a supervisor and from whoever started this: the second is
    no reason to give up what the first asked for.

    Disabled under ``torchrun``, whose processes would stop at different steps.
    """
    asked: list[int] = []
    if dist.is_initialized():
        yield asked
        return

    def remember(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, remember)
    except ValueError:  # not in the main thread: signals are somebody else's business
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
