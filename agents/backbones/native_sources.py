"""What the kernels are compiled from, for their callers and for their compiler alike."""

import hashlib
from pathlib import Path

PATTERNS = ("native*.py", "*_kernels.py", "../native*.py", "../*_kernels.py")


def digest_of_sources() -> str:
    """Return the SHA-256 of all kernel modules, which use each other's functions, and callers."""
    here = Path(__file__).parent
    texts = [path.read_bytes() for pattern in PATTERNS for path in sorted(here.glob(pattern))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()
