"""Run the benchmark: ``python -m tests.bench.growth``."""

from __future__ import annotations

from .runner import main

if __name__ == "__main__":
    raise SystemExit(main())
