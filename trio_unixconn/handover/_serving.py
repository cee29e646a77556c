"""A server in its generation: when it is ready, when it accepts, and when it drains.

Invariant: a server accepts from the queue of a listener at its end only if no successor does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import attrs

from .._listener import UnixListener
from ._listeners import GenerationListener

if TYPE_CHECKING:
    from .._accept import Accepted
    from ._passing import ConnectionsOfServer, Passer


class LiveGeneration(Protocol):
    """The methods of a generation that a server needs."""

    def retire(self) -> None: ...
    async def replaced(self) -> None: ...
    async def overdue(self) -> None: ...


@attrs.frozen
class GenerationHooks:
    """What else a server needs of its generation.

    Attributes:
      has_listener: whether a listener is one of the generation.
      wait_settled: waits until it is certain which generation accepts, and returns whether that is
        the successor.
      add_server: has connections for a server of these names received.
      passer_to: returns what passes connections on to a server; None if the successor has none of
        the name.
    """

    has_listener: Callable[[GenerationListener[Any]], bool]
    wait_settled: Callable[[], Awaitable[bool]]
    add_server: Callable[[Iterable[str]], ConnectionsOfServer]
    passer_to: Callable[[str], Passer | None]


class GenerationServer:
    """What a server with ``generation=`` does with it.

    Args:
      listeners: of the generation, for this server alone.

    Raises:
      TypeError: not listeners of this generation.
      ValueError: no listener, one of them twice, or one that another server has.
    """

    def __init__(
        self,
        generation: LiveGeneration,
        hooks: GenerationHooks,
        listeners: Sequence[object],
        *,
        unix_only: bool,
    ) -> None:
        self._generation = generation
        self._hooks = hooks
        self.listeners: list[GenerationListener[Any]] = []
        for given in listeners:
            each = cast("GenerationListener[Any]", given)
            if not isinstance(given, GenerationListener) or not hooks.has_listener(each):
                raise TypeError(
                    "expected listeners of this generation (listen_tcp, listen_unix, adopt), got "
                    f"{given!r}"
                )
            if unix_only and not isinstance(each.base, UnixListener):
                raise TypeError("expected a listener of a Unix socket, got one of TCP")
            self.listeners.append(each)
        if not self.listeners:
            raise ValueError("expected at least one listener, got an empty list")
        if len({id(each) for each in self.listeners}) < len(self.listeners):
            raise ValueError("expected different listeners, got one of them twice")
        for each in self.listeners:
            if each.is_claimed:
                raise ValueError(f"another server accepts from the listener {each.name!r}")

    @property
    def unix_listener(self) -> UnixListener:
        """The base of the only listener, with ``unix_only``."""
        base = self.listeners[0].base
        assert isinstance(base, UnixListener)  # checked above
        return base

    def retire(self) -> None:
        """End the generation without a successor: the server drains."""
        self._generation.retire()

    def claim(self) -> None:
        """Say that this server has the listeners, and is not ready yet."""
        for each in self.listeners:
            each.is_claimed = True

    def set_prepared(self) -> None:
        """Say that the server could accept now."""
        for each in self.listeners:
            each.set_prepared()

    async def accept_fd(self) -> Accepted:
        """Accept one connection from the only listener, without asking its policy."""
        return await self.listeners[0].accept_fd()

    async def follow(
        self, on_replaced: Callable[[], object], on_overdue: Callable[[], object]
    ) -> None:
        """Call a function when a successor serves, and one when this generation must end."""
        await self._generation.replaced()
        on_replaced()
        await self._generation.overdue()
        on_overdue()

    async def may_accept_last(self) -> bool:
        """Whether what is in the queues is for this generation, which does not accept any more."""
        return not await self._hooks.wait_settled() and self.is_accepting

    @property
    def is_accepting(self) -> bool:
        """Whether this generation accepts at the moment."""
        return self.listeners[0].gate.is_open

    def accept_passed(self, names: Sequence[str]) -> ConnectionsOfServer:
        """Have connections received that earlier generations pass on to a server of these names."""
        return self._hooks.add_server(names)

    def passer_to(self, name: str) -> Passer | None:
        """Return what passes connections on to a server of the successor; None if it has none."""
        return self._hooks.passer_to(name)
