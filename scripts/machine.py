"""What a result was measured on: machine, versions, commit; enough to judge it and to repeat it."""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from minrl import __version__

# Libraries that decide the speed of some contestant.
LIBRARIES = (
    *("torch", "triton", "numba", "llvmlite", "numpy", "onnxruntime"),
    *("accelerated-scan", "fla-core", "mingru-scans", "minGRU-pytorch"),
)


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return machine, versions and commit as plain JSON values."""
    return {
        "measured": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": device_name(device),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": cpu_name(),
            "cpu_count": os.cpu_count(),
            "gpu": describe_gpu(device),
            "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        },
        "versions": {
            "minrl": __version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
            **{name: version_of(name) for name in LIBRARIES},
        },
        "commit": _commit(),
        "threads": torch.get_num_threads(),
    }


def keep_freed_memory() -> bool:
    """Have the C library keep memory that is freed for what is allocated next; say if it does.

    Large tensors would otherwise go back to the system at every call, and getting them again can
    take longer than computing them, by an amount that is the system's and not a contestant's.
    """
    options = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # glibc has it
        return False
    return all([tune(*option) == 1 for option in options.values()])


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with the count of its cores: "AMD EPYC 2 CPU"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} {os.cpu_count()} CPU"


def file_name(benchmark: str, device: torch.device) -> str:
    """Return the name of a result without its ending: "scan-nvidia-h200"."""
    plain = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return f"{benchmark}-{plain}"


def total_memory() -> int | None:
    """Return the machine's memory in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def free_bytes(device: torch.device) -> int:
    """Return the memory that a benchmark may fill."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1]) * 1024 // 2
    except (OSError, TypeError):
        return 2 << 30  # a cautious guess where the system does not tell


def describe_gpu(device: torch.device) -> dict[str, Any] | None:
    """Return name, memory, driver and clocks of a GPU; None for another device."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "driver, SM clock, memory clock": _run(
            "nvidia-smi",
            "--query-gpu=driver_version,clocks.sm,clocks.mem",
            "--format=csv,noheader",
            f"--id=GPU-{properties.uuid}",  # not the index, which CUDA_VISIBLE_DEVICES changes
        ),
    }


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        return re.search(r"model name\s*:\s*(.+)", text)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def version_of(name: str) -> str | None:
    """Return the installed version of a distribution, None if it is not there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the sources, "-modified" added if they differ; None if not known."""
    # Or git would speak of another repository, one that an environment with us in it lies in.
    if _run("git", "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    commit = _run("git", "rev-parse", "HEAD")
    changes = _run("git", "status", "--porcelain", "--", ":/*.py")
    return f"{commit}-modified" if commit and changes else commit


def _run(*command: str) -> str | None:
    """Return what a program says, run where the sources are; None if it cannot be run."""
    try:
        done = subprocess.run(  # noqa: S603 - constant arguments
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
