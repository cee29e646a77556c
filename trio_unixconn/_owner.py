"""A base class for objects that own file descriptors: they cannot be copied or pickled."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex


class DescriptorOwner:
    """An object that cannot be copied or pickled, as a file cannot.

    A copy would own the same numbers. Both would close them, the second one after they have
    become numbers of other files.
    """

    __slots__ = ()

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> NoReturn:
        """Raise, for :mod:`copy` as well as for :mod:`pickle`.

        Raises:
          TypeError: always.
        """
        raise TypeError(f"cannot pickle {type(self).__name__!r} object")
