"""The process of a worker: holds some lanes and does as it is told by ``minrl.envs.workers``.

Messages are JSON, a line each, over a socket; observations, actions and the rest lie in a table in
memory that both processes share. Nothing is pickled and nothing of the parent's program is
imported but what makes the environment, so that no worker loads torch.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from typing import Any, BinaryIO

import numpy as np

from minrl.envs.lanes import Lanes, close_all, new_row_type, sizes_and_types
from minrl.envs.make import make_limited_envs
from minrl.errors import EnvError

_LONGEST = 2000  # characters of an error, which may quote anything


def share_table(memory: int, row_type: np.dtype, batch: int) -> np.ndarray:
    """Return the table, (B,), that the file ``memory`` holds."""
    mapped = mmap.mmap(memory, batch * row_type.itemsize)
    return np.frombuffer(mapped, row_type)


def pack(value: Any) -> Any:
    """Return what JSON keeps of a value such that ``unpack`` gives the same one back.

    Sequences begin with their kind, since JSON takes tuples for lists and all keys for text.

    Raises:
        TypeError: If it is, or has in it, something other than numbers, text, lists and the like.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is dict:
        return ["dict", *map(pack, value.items())]
    if type(value) in (list, tuple):
        return [type(value).__name__, *map(pack, value)]
    raise TypeError(f"{value!r} is of type {type(value).__name__}")


def unpack(packed: Any) -> Any:
    """Return what ``pack`` was given."""
    if not isinstance(packed, list):
        return packed
    kind, *items = packed
    return {"dict": dict, "list": list, "tuple": tuple}[kind](map(unpack, items))


def end_with_parent() -> None:
    """Have the system kill this process, and what it started, when the parent has gone.

    The parent's end of our standard input closes then, and on Linux a file can send a signal when
    it changes. A thread that waits for it would not get to run in every environment that hangs.
    """
    import fcntl  # not on Windows, where this module is imported too

    if not hasattr(fcntl, "F_SETSIG"):  # macOS, where the one signal that files send is ignored
        wait = "exec 3<&0; { read _ <&3; kill -9 0; } &"  # a shell that does nothing else
        subprocess.run(["/bin/sh", "-c", wait], check=True)  # noqa: S603 - our own words
        return
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:  # it went before we said so
        sys.exit(1)


def register(packed_spec: Any) -> str:
    """Make an environment known here as it is in the parent; return its id."""
    import gymnasium
    from gymnasium.envs.registration import EnvSpec, WrapperSpec

    fields = unpack(packed_spec)
    wrappers = tuple(WrapperSpec(**wrapper) for wrapper in fields["additional_wrappers"])
    spec = EnvSpec(**{**fields, "additional_wrappers": wrappers})
    gymnasium.registry[spec.id] = spec
    return spec.id


def serve(stream: BinaryIO, memory: int) -> None:
    """Do what the parent asks for until it has gone; answer each request with one line."""

    def answer(error: str | None = None, **values: Any) -> None:
        message = {"error": error and error[:_LONGEST], **values}
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()

    requests = map(bytes.strip, stream)
    job = json.loads(next(requests, b"null"))
    if job is None:  # the parent went before it asked for anything
        return
    try:
        name = register(job["spec"])
        environments = make_limited_envs(name, job["count"], job["max_episode_steps"])
    except EnvError as error:
        answer(str(error))
        return
    sizes = sizes_and_types(environments[0])
    answer(sizes=sizes)
    for request in requests:
        try:
            if request == b"close":
                answer(problems=close_all(environments))
                return
            if request == b"start":
                lanes = Lanes(
                    environments,
                    name,
                    episodes=job["episodes"],
                    seed=job["seed"],
                    table=share_table(memory, new_row_type(*sizes), job["batch"]),
                    first_row=job["first_row"],
                )
                lanes.start()
            else:
                lanes.step()
        except EnvError as error:
            answer(str(error))
        else:
            answer()


def main(link: int, memory: int) -> None:
    """Be a worker.

    Args:
        link: File descriptor of the socket to the parent.
        memory: File descriptor of what the table lies in.
    """
    faulthandler.enable()  # where a simulator crashed is worth a few lines
    end_with_parent()
    with (
        contextlib.suppress(BrokenPipeError, ConnectionResetError),  # the parent has gone
        socket.socket(fileno=link) as connection,
        connection.makefile("rwb") as stream,
    ):
        serve(stream, memory)
