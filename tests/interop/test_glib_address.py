"""UnixSocketAddress.to_string() against that of the real Gio.UnixSocketAddress."""

from __future__ import annotations

import json
import subprocess

import pytest

from interop.harness import SYSTEM_PYTHON
from trio_unixconn import UnixSocketAddress

pytestmark = pytest.mark.usefixtures("real_glib")

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import gi
gi.require_version("Gio", "2.0")
from gi.repository import Gio
kinds = Gio.UnixSocketAddressType
print(json.dumps([
    Gio.UnixSocketAddress.new_with_type(
        # char is signed here.
        [(byte + 128) % 256 - 128 for byte in name], getattr(kinds, kind.upper())
    ).to_string()
    for kind, name in json.load(sys.stdin)
]))
"""


def test_to_string() -> None:
    """to_string() is that of Gio, for every byte, in paths, abstract and anonymous names."""
    names = [bytes([97, byte, 98]) for byte in range(256)]
    names += ["/run/café".encode(), b"/run/x", b"\xff\xfe", rb"/a\x0a"]
    asked = [(kind, list(name)) for kind in ("abstract", "path") for name in names]
    # A path ends at its first NUL, and ours cannot contain one.
    asked = [(kind, name) for kind, name in asked if kind == "abstract" or 0 not in name]
    asked.append(("anonymous", []))
    done = subprocess.run(
        [SYSTEM_PYTHON, "-c", SCRIPT],
        input=json.dumps(asked),
        text=True,
        capture_output=True,
        check=True,
    )
    ours = [
        UnixSocketAddress((b"\0" if kind == "abstract" else b"") + bytes(name)).to_string()
        for kind, name in asked
    ]
    assert ours == json.loads(done.stdout)
