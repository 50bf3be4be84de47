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
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable

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


def new_empty(tensor: Tensor, *shape: int) -> Tensor:
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
