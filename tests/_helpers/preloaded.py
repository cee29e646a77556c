"""A module that a template imports in the tests; it does what the variable PRELOADED says."""

from __future__ import annotations

import os
import threading

if os.environ.get("PRELOADED") == "thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
elif os.environ.get("PRELOADED") == "raise":
    raise ZeroDivisionError("not today")
