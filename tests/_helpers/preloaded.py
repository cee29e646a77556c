"""A module that a template imports in the tests; it does what the variable PRELOADED says."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any, cast

if os.environ.get("PRELOADED") == "thread":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
elif os.environ.get("PRELOADED") == "raise":
    raise ZeroDivisionError("not today")
elif os.environ.get("PRELOADED") == "closed":
    with open(os.devnull, "w") as sys.stdout:
        pass
elif os.environ.get("PRELOADED") == "no output":
    sys.stdout = cast("Any", None)
elif os.environ.get("PRELOADED") == "ignore":
    # The kernel reaps each child.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
elif os.environ.get("PRELOADED") == "reap":
    signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, os.WNOHANG))
