"""Cause the same faults in this library and in others, and print how each handles them."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
