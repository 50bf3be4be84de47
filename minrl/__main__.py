"""``python -m minrl``: the same as ``minrl``."""

import sys

from minrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
