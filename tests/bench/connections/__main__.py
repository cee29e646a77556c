"""Measure the speed of this library and of other implementations."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
