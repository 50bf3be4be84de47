"""Child processes that start within milliseconds, to be killed or starved of disk space.

They are forked from a server that has imported all that is slow to import, and has done nothing
else: no computation, whose threads a fork would break.
"""

import contextlib
import ctypes
import multiprocessing
import os
import resource
import signal
import sys

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "pytest",
        "minrl.scripts.train",
        "minrl.cli",
        "tyro",
        "h5py",
        "minari",
        "gymnasium.envs.classic_control.pendulum",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "safetensors.torch",
        "tensorboard.compat.proto.event_pb2",
        "tensorboard.summary.writer.record_writer",
        "torch._dynamo",
        "mujoco",
        "numba",
    ]
)
NEW_USER, NEW_MOUNT, NO_DEVICES = 0x10000000, 0x00020000, 4  # linux/sched.h, sys/mount.h


@contextlib.contextmanager
def started(function, *arguments, output=os.devnull):
    """Call a function of a module in a child, its prints and errors going to a file."""
    process = FORKS.Process(target=_run, args=(function, arguments, dict(os.environ), str(output)))
    process.start()
    try:
        yield process
    finally:
        process.kill()  # nothing, if it has ended
        process.join()
        process.close()


def ask(function, *arguments):
    """Return what a function gives in a child: it must be able to travel through a pipe."""
    ours, theirs = FORKS.Pipe(duplex=False)
    with ours, started(_answer, theirs, function, arguments) as process:
        theirs.close()
        process.join()
        assert ours.poll(), f"the child ended with {process.exitcode} and no answer"
        return ours.recv()


def limit_file_size(limit):
    """Let no file of this process grow beyond so many bytes, as if the disk were full then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))


def mount_small_disk(path, size):
    """Mount a file system of so many bytes that this process alone sees.

    Raises:
        OSError: If that is not allowed here.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNT if user == 0 else NEW_USER | NEW_MOUNT):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    if user != 0:
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    libc.mount(None, b"/", None, 0x44000, None)  # private: nobody else is to see it
    options = f"size={size}".encode()
    if libc.mount(b"none", os.fsencode(path), b"tmpfs", NO_DEVICES, options):
        raise OSError(ctypes.get_errno(), "no mount")


def minrl(*arguments):
    """Run a ``minrl`` command and exit with its status."""
    from minrl import cli

    sys.exit(cli.main(arguments))


def _run(function, arguments, environment, output):
    import torch

    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    function(*arguments)


def _answer(pipe, function, arguments):
    with contextlib.closing(pipe):
        pipe.send(function(*arguments))
