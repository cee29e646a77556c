"""Measure how fast and how fair the worker pool is, beside other servers."""

import sys

from .runner import main

if __name__ == "__main__":
    sys.exit(main())
