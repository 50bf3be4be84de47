"""Finding the processes that a test has started, and what they have started, on Linux."""

import time
from pathlib import Path


def marked_processes(word):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"MINRL_TEST_MARK={word}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it has just ended
            continue
    return found


def children():
    """Child processes of this one, dead ones that nobody has waited for included."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        found |= set((task / "children").read_text().split())
    return found


def wait_until_gone(word, seconds):
    """Whether all are gone in time. This process does not count: it began before the mark."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not marked_processes(word):
            return True
        time.sleep(0.02)
    return False
