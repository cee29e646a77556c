"""Base classes for objects that own file descriptors."""

from __future__ import annotations

from abc import abstractmethod
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, SupportsIndex

if TYPE_CHECKING:
    from typing_extensions import Self


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


class ContextOwner(DescriptorOwner):
    """An owner that is a context manager: ``with`` calls :meth:`close`."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Close the descriptors; closing twice is allowed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class ClosableOwner(ContextOwner):
    """An owner that can be closed in both ways: its context managers.

    ``with`` calls :meth:`close`, which may block; ``async with`` calls :meth:`aclose`, which does
    not.
    """

    __slots__ = ()

    @abstractmethod
    async def aclose(self) -> None:
        """Close the descriptors without blocking the event loop."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
