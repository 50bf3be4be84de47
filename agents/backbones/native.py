"""Python functions on C pointers, compiled to machine code once and loaded in every later process.

A *kernel module* is written for Numba. It is compiled in a process of its own, so that neither
Numba's import (a third of a second) nor its failure reaches the caller, and its object code is kept
on disk; loading it takes llvmlite alone, 30 ms. What comes back are ctypes functions, which release
the interpreter lock while they run.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from minrl.agents.backbones.native_sources import digest_of_sources
from minrl.cache import cache_folder

# How the arguments of a kernel are spelled: pointers to elements, and numbers.
C_TYPES = {
    "f": ctypes.c_void_p,  # float32*
    "b": ctypes.c_void_p,  # uint8*
    "i": ctypes.c_int64,
}

COMPILER = "minrl.agents.backbones.native_compiler"
COMPILE_SECONDS = 120
MARK = b"minrl kernels:"  # what the compiler writes them behind
# Of the files that this process runs: they may be others by the time a kernel is first needed, and
# the compiler may find another installation.
SOURCES = digest_of_sources()

HUGE_PAGE = 2 * 1024 * 1024
MADV_HUGEPAGE = 14

_engines: list = []  # MCJIT engines own the code that the loaded functions run


@functools.cache
def load_kernels(module: str, *variant: str) -> dict[str, Callable] | None:
    """Return the compiled functions of a kernel module, by name; None if that cannot be.

    Args:
        module: Import name. The module has ``kernels(*variant)``, which returns for each name a
            function and its arguments' types, one letter each as in ``C_TYPES``.
        *variant: Which of its kernels; each variant is compiled when it is first asked for.
    """
    if os.environ.get("MINRL_NATIVE") == "0":
        return None
    try:
        return _load(_compiled(module, variant))
    except (ImportError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[-300:]
        warnings.warn(
            f"minrl computes without compiled kernels, correctly but slower: {reason} "
            "(Numba and llvmlite compile them; MINRL_NATIVE=0 turns this off)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _compiled(module: str, variant: tuple[str, ...]) -> bytes:
    """Return the object file of a variant from the cache, made anew where there is no sound one."""
    path = cache_folder() / f"{module.rpartition('.')[2]}-{_fingerprint(variant)}.o"
    if path.exists() and (kept := _unsealed(path.read_bytes())) is not None:
        return kept
    if not sys.executable:
        raise RuntimeError("there is no Python to compile with in this process")
    done = subprocess.run(  # noqa: S603 - this interpreter, on this package's own module
        [sys.executable, "-m", COMPILER, MARK.decode(), SOURCES, module, *variant],
        env=_environment(),
        capture_output=True,
        timeout=COMPILE_SECONDS,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.decode(errors="replace"))
    made = done.stdout.rpartition(MARK)[2]  # a site's start-up hooks may have printed before it
    _split(made)
    # Kept as a whole or not at all: other processes may be looking. Where nothing can be kept,
    # the price is compiling again in the next process.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(hashlib.sha256(made).digest() + made)
        unfinished.replace(path)
    return made


def _environment() -> dict[str, str]:
    """Return this process's environment for the compiler, without what would mislead it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return {**kept, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}  # not the current folder first


def _split(code: bytes) -> tuple[dict[str, tuple[str, str]], bytes]:
    """Return each kernel's symbol and argument types, and the machine code behind them.

    Raises:
        ValueError: If it is not what the compiler writes.
    """
    header, _, machine_code = code.partition(b"\n")
    return json.loads(header), machine_code


def _unsealed(content: bytes) -> bytes | None:
    """Return what follows the SHA-256, if it fits: running damaged code would end the process."""
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def _fingerprint(variant: tuple[str, ...]) -> str:
    """Return a name for everything that the object code depends on."""
    from llvmlite import binding

    parts = [
        SOURCES,
        *variant,
        binding.get_host_cpu_name(),
        binding.get_host_cpu_features().flatten(),
    ]
    parts += [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _load(code: bytes) -> dict[str, Callable]:
    from llvmlite import binding

    kernels, machine_code = _split(code)
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple().create_target_machine()
    # With llvmlite's memory manager, which keeps code and constants within reach of each other: in
    # a large process LLVM's own may not, and then ends it.
    empty = binding.parse_assembly("")
    engine = binding.create_mcjit_compiler(empty, target, use_lmm=True)
    engine.add_object_file(binding.ObjectFileRef.from_data(machine_code))
    engine.finalize_object()
    _engines.append(engine)
    functions = {}
    for name, (symbol, arguments) in kernels.items():
        prototype = ctypes.CFUNCTYPE(None, *(C_TYPES[letter] for letter in arguments))
        functions[name] = prototype(engine.get_function_address(symbol))
    return functions


def empty_like(tensor: Tensor, *shape: int) -> Tensor:
    """Return an uninitialised tensor of the type of ``tensor``, large ones on huge pages.

    Touching fresh memory costs two thirds of a kernel's time where it comes in pages of 4 KiB.
    """
    made = tensor.new_empty(shape)
    size = made.numel() * made.element_size()
    if size >= 2 * HUGE_PAGE and (advise := _madvise()) is not None:
        start = -(-made.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (made.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        advise(start, end - start, MADV_HUGEPAGE)  # a wish: that it fails changes nothing
    return made


@functools.cache
def _madvise() -> Callable | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def run_parallel(kernel: Callable, arguments: tuple, units: int, *, least: int = 1) -> None:
    """Call ``kernel(*arguments, first, stop)`` over the ranges of ``units``, one for each thread.

    Args:
        kernel: From :func:`load_kernels`; its last two arguments are the range to work on.
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
