"""Any contiguous buffer as bytes, without a copy.

Source: https://docs.python.org/3/c-api/buffer.html
"""

from __future__ import annotations

from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview


def bytes_of(data: Buffer, name: str = "data") -> memoryview:
    """Return any contiguous buffer as bytes.

    Raises:
      TypeError: not a buffer, or not a contiguous one; the error calls it ``name``.
    """
    try:
        view = memoryview(data)
    except TypeError:
        raise TypeError(f"{name} must be a bytes-like object, got {type(data).__name__}") from None
    if not view.c_contiguous:
        raise TypeError(f"{name} must be a contiguous buffer; copy it with bytes()")
    # A view without elements, but with several dimensions, cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")
