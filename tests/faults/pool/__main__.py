"""Cause faults in workers, or their pool, while clients are connected."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
