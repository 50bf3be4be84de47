"""Where minrl keeps what it can make again; whoever writes there runs code as you."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return MINRL_CACHE, else minrl in the user's cache; it need not exist."""
    if folder := os.environ.get("MINRL_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minrl"
