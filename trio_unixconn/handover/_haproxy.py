r"""HAProxy as a partner: take its listening sockets, or give it ours, in its own protocol.

A process that starts asks the one that runs, over the Unix socket of its command line:

    new                                     old
    "_getsocks\n"               ------->
                               <-------     an int: how many sockets follow
                               <-------     up to 252 file descriptors, and for each of them:
                                              a length (a byte), and the network namespace
                                              a length (a byte), and the interface
                                              an int: options before HAProxy 2.3, otherwise 0
    an int                     ------->     once for each message; the next one follows

An int is one of the machine, of four bytes. The old process closes the connection without a word
if it gives nothing. HAProxy sends the same since 1.8; 3.2 is the first that waits for the last
acknowledgement, too. Everything else of a socket, such as its address, is asked of the kernel.

Invariant: nothing is accepted here. A file descriptor that is not returned is closed; HAProxy has
its own.

Sources: HAProxy's management guide (``-x``, ``-sf``), its configuration manual (``expose-fd``), and
what HAProxy 2.6 does
"""

from __future__ import annotations

import ipaddress
import logging
import re
import signal
import socket as stdlib_socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from .. import _kernel
from .._address import AddressLike, UnixSocketAddress
from .._client import open_unix_connection
from .._closing import close_fds
from .._listener import UnixListener, set_binding
from .._owner import ContextOwner, DescriptorOwner
from .._policy import PeerPolicy, check_policy
from .._server import UnixServer, serve_unix
from .._sockopts import raw_socket
from ..errors import IOErrorEnum, PeerDeniedError, TakeOverError
from ._listeners import GenerationListener
from ._manifest import MAX_LISTENERS, describe_socket

if TYPE_CHECKING:
    from .._connection import UnixConnection

T = TypeVar("T")

logger: Final = logging.getLogger("trio_unixconn.handover")

# Host and port, or the path, or a NUL and the abstract name.
_Address: TypeAlias = "tuple[str, int] | str"
#: A listener that can be given to HAProxy.
AnyListener: TypeAlias = "trio.SocketListener | UnixListener | GenerationListener[Any]"

_COMMAND: Final = b"_getsocks\n"
_int: Final = struct.Struct("=i")
#: The maximum number of file descriptors that HAProxy sends or receives in one message.
MAX_BATCH: Final = 252
_CHUNK_SIZE: Final = 256 * 1024
# The maximum number of bytes of a client before the end of its command.
_MAX_COMMAND: Final = 1024
#: How long a client has to ask for the sockets and to take them, in seconds.
CLIENT_TIMEOUT: Final = 10.0
# How many clients are answered at a time.
_MAX_CLIENTS: Final = 16
# HAProxy binds a path as PATH.PID.tmp, and renames that to PATH.
_TEMPORARY: Final = re.compile(rb"\.[0-9]+\.tmp\Z")
# With these, HAProxy asks a process to stop accepting for a moment, or to accept again. The default
# action of both is to stop the process.
_PAUSES: Final = (signal.SIGTTOU, signal.SIGTTIN)


@attrs.frozen
class HAProxySocket:
    """What is known of a socket that HAProxy has handed over.

    Attributes:
      address: host and port of a TCP listener; of a Unix listener the path, or a NUL and the
        abstract name.
      interface: the network interface that HAProxy has bound it to; "" if none.
      namespace: the network namespace that it is in, by HAProxy's name for it; "" if it is
        HAProxy's own.
    """

    address: tuple[str, int] | str
    interface: str = ""
    namespace: str = ""


class HAProxyListeners(ContextOwner):
    """The listening sockets that HAProxy has handed over: a context manager that owns them.

    At the end of the block, those that were not asked for are closed. They are still HAProxy's,
    until that ends: then the connections in their queues are reset.

    Attributes:
      sockets: what HAProxy has handed over, including what was asked for already. One of them is
        the socket of its command line.
    """

    def __init__(self, found: Sequence[tuple[HAProxySocket, stdlib_socket.socket]]) -> None:
        self.sockets: tuple[HAProxySocket, ...] = tuple(each for each, _ in found)
        self._left = list(found)

    def tcp(self, port: int, *, host: str = "127.0.0.1") -> list[trio.SocketListener]:
        """Return the TCP listeners at an address; the caller owns them.

        Args:
          host: an address, in numbers; HAProxy's ``bind *:80`` is ``"0.0.0.0"``, and its
            ``bind :::80`` is ``"::"``.

        Returns:
          Mostly one; several if HAProxy has divided the address (``shards``). Each has its own
          queue, so serve all of them. An empty list if there is none.

        Raises:
          ValueError: ``host`` is not an address; or HAProxy, which paused, has ended the listening
            meanwhile. Nothing is taken then.
        """
        wanted = ipaddress.ip_address(host), port
        return self._take(
            lambda address: (
                isinstance(address, tuple)
                and (ipaddress.ip_address(address[0].partition("%")[0]), address[1]) == wanted
            ),
            lambda sock: trio.SocketListener(trio.socket.from_stdlib_socket(sock)),
        )

    def unix(
        self,
        address: AddressLike,
        *,
        policy: PeerPolicy | None = None,
        receive_descriptors: bool = True,
    ) -> UnixListener | None:
        r"""Return the Unix listener at a path, or an abstract name; the caller owns it.

        Closing it leaves the path.

        Args:
          address: as in HAProxy's configuration; ``abns@name`` is the abstract name ``"\0name"``.
          policy, receive_descriptors: as of :func:`open_unix_listener`.

        Returns:
          None if there is none.
        """
        check_policy(policy)
        name = UnixSocketAddress.from_any(address)
        wanted = _text(name.native)
        found = self._take(
            lambda address: address == wanted,
            lambda sock: UnixListener(
                trio.socket.from_stdlib_socket(sock),
                policy=policy,
                receive_descriptors=receive_descriptors,
                address=name,
            ),
            most=1,
        )
        return found[0] if found else None

    def _take(
        self,
        matches: Callable[[_Address], bool],
        make: Callable[[stdlib_socket.socket], T],
        most: int = MAX_LISTENERS,
    ) -> list[T]:
        found = [each for each in self._left if matches(each[0].address)][:most]
        # If one cannot be made, all are still to be closed at the end of the block.
        made = [make(sock) for _, sock in found]
        for each in found:
            self._left.remove(each)
        return made

    def close(self) -> None:
        """Close those that were not asked for; closing twice is allowed."""
        close_fds([sock.detach() for _, sock in self._left])
        self._left.clear()

    def __repr__(self) -> str:
        return f"<HAProxyListeners: {len(self.sockets)}, {len(self._left)} not asked for>"


################################################################
# Taking
################################################################


@enable_ki_protection
async def take_haproxy_listeners(
    path: AddressLike, *, policy: PeerPolicy | None = None
) -> HAProxyListeners:
    """Take the listening sockets of a running HAProxy, which goes on accepting from them.

    ::

        with await take_haproxy_listeners("/run/haproxy/admin.sock") as taken:
            listeners = taken.tcp(80, host="0.0.0.0")
        nursery.start_soon(trio.serve_listeners, handler, listeners)
        os.kill(haproxy_pid, signal.SIGUSR1)

    Both processes accept until SIGUSR1 tells HAProxy to stop accepting and to finish what it has
    begun, so that no client is refused. Sockets for datagrams (``log-forward``, QUIC) stay there.

    HAProxy needs ``stats socket PATH expose-fd listeners`` in its configuration. For a timeout, use
    ``trio.fail_after``.

    Args:
      path: of the socket of HAProxy's command line.
      policy: which process is admitted as HAProxy; default: one of this user, or of root, as which
        HAProxy starts.

    Raises:
      TakeOverError: HAProxy does not hand over, or sends something else than listening sockets;
        everything that has arrived is closed, and HAProxy serves on.
      DescriptorsTruncatedError: this process has no free file descriptor; likewise.
      OSError: as :func:`open_unix_connection`.
    """
    policy = policy or _default_policy()
    try:
        conn = await open_unix_connection(path, policy=policy)
    except PeerDeniedError as exc:
        error = TakeOverError(f"the policy does not admit the process that runs: {exc}")
        error.code = IOErrorEnum.PERMISSION_DENIED
        raise error from exc
    reader = _Reader()
    try:
        async with conn:
            await _receive_all(conn, reader)
        return HAProxyListeners(reader.open())
    finally:
        reader.close()


async def _receive_all(conn: UnixConnection, reader: _Reader) -> None:
    try:
        await conn.send_all(_COMMAND)
        while not reader.is_complete():
            message = await conn.receive_message(_CHUNK_SIZE)
            fds = message.fds.steal_fds()
            reader.feed(message.data, fds)
            if fds:
                # After the last one, HAProxy may have closed the connection.
                with suppress(trio.BrokenResourceError):
                    await conn.send_all(_int.pack(len(reader.fds)))
    except trio.BrokenResourceError:
        # An acknowledgement that HAProxy has not read makes a reset of the end of the stream.
        reader.feed(b"", [])


class _Reader(DescriptorOwner):
    """What has arrived from HAProxy; it owns the file descriptors.

    Attributes:
      fds: all that have arrived, in order.
    """

    def __init__(self) -> None:
        self.fds: list[int] = []
        self._data = bytearray()
        self._total: int | None = None
        # Namespace and interface of each.
        self._names: list[tuple[str, str]] = []

    def is_complete(self) -> bool:
        return self._total is not None and self._total == len(self.fds) == len(self._names)

    def feed(self, data: bytes, fds: list[int]) -> None:
        """Add a message.

        Raises:
          TakeOverError: the end of the stream, or something that does not belong there.
        """
        self.fds.extend(fds)
        if not data:
            if self._total is None:
                raise TakeOverError(
                    "HAProxy has sent no sockets; its configuration needs 'expose-fd listeners' "
                    "on the line 'stats socket', and it must have a listener"
                )
            raise TakeOverError(
                f"expected {self._total} sockets of HAProxy, got {len(self.fds)} and then the end "
                "of the stream"
            )
        self._data += data
        if self._total is None:
            if len(self._data) < _int.size:
                return
            self._total = self._read_total()
        while len(self._names) < self._total and self._read_names():
            pass
        if len(self.fds) > self._total or (len(self._names) == self._total and self._data):
            raise TakeOverError(f"expected {self._total} sockets of HAProxy, got more than that")

    def _read_total(self) -> int:
        total = int(_int.unpack_from(self._data)[0])
        if not 0 < total <= MAX_LISTENERS:
            raise TakeOverError(
                f"expected the number of HAProxy's sockets, got {total} "
                f"({bytes(self._data[:40])!r}); is this the socket of its command line?"
            )
        del self._data[: _int.size]
        return total

    def _read_names(self) -> bool:
        """Read what belongs to one socket; return False if it has not arrived as a whole."""
        data, names, end = self._data, list[str](), 0
        for _ in range(2):
            if end >= len(data):
                return False
            begin, end = end + 1, end + 1 + data[end]
            names.append(data[begin:end].decode(errors="backslashreplace"))
        end += _int.size
        if end > len(data):
            return False
        del data[:end]
        self._names.append((names[0], names[1]))
        return True

    def open(self) -> list[tuple[HAProxySocket, stdlib_socket.socket]]:
        """Return the listening sockets, which the caller owns.

        Raises:
          TakeOverError: something else is among them.
        """
        found: list[tuple[HAProxySocket, stdlib_socket.socket]] = []
        datagrams: list[int] = []
        try:
            for number, (fd, names) in enumerate(zip(self.fds, self._names, strict=True)):
                opened = _open_socket(fd, number)
                if opened is None:
                    datagrams.append(fd)
                    continue
                sock, address = opened
                namespace, interface = names
                found.append((HAProxySocket(address, interface, namespace), sock))
        except BaseException:
            for _, sock in found:
                sock.detach()
            raise
        self.fds.clear()
        close_fds(datagrams)
        return found

    def close(self) -> None:
        close_fds(self.fds)
        self.fds.clear()


def _open_socket(fd: int, number: int) -> tuple[stdlib_socket.socket, _Address] | None:
    """Return a listening socket, which owns ``fd``, and its address; None: it is for datagrams.

    Raises:
      TakeOverError: it is something else; ``fd`` is still the caller's.
    """
    try:
        sock = stdlib_socket.socket(fileno=fd)
    except OSError as exc:
        raise TakeOverError(f"socket {number} of HAProxy: got another kind of file") from exc
    try:
        if sock.type == stdlib_socket.SOCK_DGRAM:
            sock.detach()
            return None
        describe_socket(sock)
        return sock, _address_of(sock)
    except (OSError, ValueError) as exc:
        sock.detach()
        raise TakeOverError(f"socket {number} of HAProxy: {exc}") from exc


def _address_of(sock: stdlib_socket.socket) -> _Address:
    name: Any = sock.getsockname()
    if sock.family != _kernel.AF_UNIX:
        return str(name[0]), int(name[1])
    native = UnixSocketAddress.from_native(name).native
    if native[:1] == b"\0":
        # HAProxy's abstract names fill the whole address with NULs.
        return _text(native.rstrip(b"\0"))
    return _text(_TEMPORARY.sub(b"", native))


def _text(native: bytes) -> str:
    return native.decode(errors="surrogateescape")


################################################################
# Giving
################################################################


async def serve_haproxy_listeners(
    path: AddressLike,
    listeners: Iterable[AnyListener],
    *,
    policy: PeerPolicy | None = None,
    mode: int = 0o600,
    replace: bool = False,
    task_status: trio.TaskStatus[UnixServer] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hand listeners over to an HAProxy that asks for them: ``haproxy -x PATH -sf PID``.

    HAProxy takes those for which its configuration has a ``bind`` with the same address, and opens
    the others. When it accepts, it sends SIGUSR1 to the process PID (SIGTERM with ``-st``). The
    program then stops accepting and lets its handlers finish, such as with
    :meth:`UnixServer.drain`; without a handler of its own, SIGUSR1 kills a process.

    ::

        await nursery.start(serve_haproxy_listeners, "/run/app/haproxy.sock", listeners)
        with trio.open_signal_receiver(signal.SIGUSR1) as signals:
            async for _ in signals:
                ...

    If HAProxy fails to start, nothing has changed. If it cannot bind an address, it sends SIGTTOU
    and later SIGTTIN, which would stop this process: while this runs in the main thread, both are
    ignored unless the program handles them.

    A Unix listener that was handed over does not remove its path when it is closed. HAProxy finds
    it only if the path is also the name of the socket (getsockname), not if it was opened with
    ``replace=True``.

    Args:
      listeners: of TCP or Unix sockets; they stay the caller's. One that was closed meanwhile is
        not handed over.
      policy: which processes get them; default: those of this user, and of root.
      mode, replace: of the path, as of :func:`open_unix_listener`.

    Returns:
      Only if the server that ``nursery.start`` returns is drained.

    Raises:
      TypeError: not a listener.
      ValueError: no listeners, or one that is closed.
      AddressInUseError: as :func:`open_unix_listener`.
      OSError: as :func:`open_unix_listener`.
    """
    found = list(listeners)
    for each in found:
        if not isinstance(each, (trio.SocketListener, UnixListener, GenerationListener)):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"expected a listener, got {type(each).__name__}")
        if each.socket.fileno() == -1:
            raise ValueError(f"expected a listener that is open, got {each!r}")
    if not found:
        raise ValueError("listeners must not be empty")
    policy = policy or _default_policy()

    async def handler(conn: UnixConnection) -> None:
        await _answer(conn, found)

    with _pauses_ignored():
        await serve_unix(
            handler,
            path,
            policy=policy,
            max_connections=_MAX_CLIENTS,
            handler_errors="log",
            mode=mode,
            replace=replace,
            receive_descriptors=False,
            task_status=task_status,
        )


def _default_policy() -> PeerPolicy:
    return PeerPolicy.same_user() | PeerPolicy.root()


async def _answer(conn: UnixConnection, listeners: Sequence[AnyListener]) -> None:
    """Answer one client; what it does wrong is logged."""
    peer = conn.get_peer_credentials()
    why = f"it did not take them within {CLIENT_TIMEOUT:g} s"
    with trio.move_on_after(CLIENT_TIMEOUT):
        try:
            command = await _receive_command(conn)
            if command != _COMMAND:
                why = f"expected {_COMMAND!r}, got {command!r:.60}"
            else:
                given = await _give(conn, listeners)
                logger.info("pid %d has taken %d listeners, as HAProxy", peer.pid, given)
                return
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            why = str(exc)
    logger.warning("listeners were not handed over to pid %d, as HAProxy: %s", peer.pid, why)


async def _receive_command(conn: UnixConnection) -> bytes:
    command = b""
    while b"\n" not in command and len(command) < _MAX_COMMAND:
        more = await conn.receive_some(_MAX_COMMAND)
        if not more:
            break
        command += more
    return command


async def _give(conn: UnixConnection, listeners: Sequence[AnyListener]) -> int:
    """Hand over the listeners that are open; return how many."""
    given = [each for each in listeners if each.socket.fileno() != -1]
    if not given:
        raise trio.ClosedResourceError("all listeners are closed")
    await conn.send_all(_int.pack(len(given)))
    acknowledged = 0
    for begin in range(0, len(given), MAX_BATCH):
        batch = given[begin : begin + MAX_BATCH]
        if any(each.socket.fileno() == -1 for each in batch):
            # Their number was announced.
            raise trio.ClosedResourceError("a listener was closed meanwhile")
        names = b"".join(_names_of(raw_socket(each.socket)) for each in batch)
        await conn.send_message(names, fds=[each.socket for each in batch])
        # Not when it has acknowledged them: if this process is told to stop before it has read
        # that, the path of a socket that HAProxy serves must not be removed.
        for each in batch:
            _leave_path(each)
        while acknowledged < _int.size:
            more = await conn.receive_some(_int.size)
            if not more:
                raise trio.BrokenResourceError("it has closed the connection")
            acknowledged += len(more)
        acknowledged -= _int.size
    return len(given)


def _leave_path(listener: AnyListener) -> None:
    """Keep a listener from removing its path when it is closed."""
    if isinstance(listener, UnixListener):
        set_binding(listener, None)
    elif isinstance(listener, GenerationListener):
        listener.disown_path()


def _names_of(sock: stdlib_socket.socket) -> bytes:
    """Return the namespace, the interface and the options of a socket, as HAProxy sends them."""
    interface = b""
    if sock.family in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6) and _kernel.SO_BINDTODEVICE:
        raw = sock.getsockopt(_kernel.SOL_SOCKET, _kernel.SO_BINDTODEVICE, 16)
        interface = raw.partition(b"\0")[0]
    return b"".join([b"\0", bytes([len(interface)]), interface, _int.pack(0)])


def _ignore_pause(number: int, _: object) -> None:
    logger.warning(
        "ignored %s, with which HAProxy asks this process to pause or to go on",
        signal.Signals(number).name,
    )


# How many servers need each of these signals ignored.
_ignoring: Final[Counter[signal.Signals]] = Counter()


@contextmanager
def _pauses_ignored() -> Generator[None, None, None]:
    """Ignore the signals with which HAProxy asks for a pause, unless the program handles them."""
    ignored: list[signal.Signals] = []
    if threading.current_thread() is threading.main_thread():
        for number in _PAUSES:
            # Not SIG_IGN, which programs that this one starts would inherit.
            if signal.getsignal(number) in (signal.SIG_DFL, _ignore_pause):
                signal.signal(number, _ignore_pause)
                ignored.append(number)
    _ignoring.update(ignored)
    try:
        yield
    finally:
        _ignoring.subtract(ignored)
        for number in ignored:
            # The program may have begun to handle it meanwhile.
            if not _ignoring[number] and signal.getsignal(number) is _ignore_pause:
                signal.signal(number, signal.SIG_DFL)
