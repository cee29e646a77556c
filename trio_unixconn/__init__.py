"""trio_unixconn: Unix-domain connections for trio.

Open files, sockets and proof of identity from one process to another on the same machine:
``Gio.UnixConnection``, awaitable, cancellable and without leaks.
"""

from ._address import (
    AddressLike as AddressLike,
    UnixSocketAddress as UnixSocketAddress,
)
from ._callback_connection import CallbackConnection as CallbackConnection
from ._callbacks import (
    CallbackAdapter as CallbackAdapter,
    open_callback_adapter as open_callback_adapter,
)
from ._cancellable import Cancellable as Cancellable, CancellableScope as CancellableScope
from ._client import open_unix_connection as open_unix_connection
from ._connection import (
    DescriptorStream as DescriptorStream,
    FileDescriptor as FileDescriptor,
    UnixConnection as UnixConnection,
    connection_pair as connection_pair,
)
from ._credentials import Credentials as Credentials
from ._datagram import (
    Datagram as Datagram,
    UnixDatagramSocket as UnixDatagramSocket,
    open_unix_datagram as open_unix_datagram,
)
from ._fdlist import UnixFDList as UnixFDList
from ._fdtypes import DescriptorKind as DescriptorKind
from ._identity import PeerIdentity as PeerIdentity
from ._listener import UnixListener as UnixListener, open_unix_listener as open_unix_listener
from ._memfd import Seals as Seals
from ._messages import (
    Message as Message,
    UnixCredentialsMessage as UnixCredentialsMessage,
    UnixFDMessage as UnixFDMessage,
)
from ._policy import PeerPolicy as PeerPolicy
from ._public import export as _export
from ._results import AsyncReadyCallback as AsyncReadyCallback, AsyncResult as AsyncResult
from ._server import UnixServer as UnixServer, serve_unix as serve_unix
from ._version import __version__ as __version__
from .errors import (
    AddressInUseError as AddressInUseError,
    ConnectionBrokenError as ConnectionBrokenError,
    ConnectionBusyError as ConnectionBusyError,
    ConnectionClosedError as ConnectionClosedError,
    DatagramTruncatedError as DatagramTruncatedError,
    DescriptorsRefusedError as DescriptorsRefusedError,
    DescriptorsTruncatedError as DescriptorsTruncatedError,
    EndOfStreamError as EndOfStreamError,
    HandlerError as HandlerError,
    IOErrorEnum as IOErrorEnum,
    JobRefusedError as JobRefusedError,
    NotSupportedError as NotSupportedError,
    OperationCancelled as OperationCancelled,
    PeerDeniedError as PeerDeniedError,
    PeerGoneError as PeerGoneError,
    PoolClosedError as PoolClosedError,
    ReadAheadError as ReadAheadError,
    SendError as SendError,
    SuccessorGoneError as SuccessorGoneError,
    TakeOverError as TakeOverError,
    UnexpectedControlMessageError as UnexpectedControlMessageError,
    UnexpectedDescriptorsError as UnexpectedDescriptorsError,
    UnixConnectionError as UnixConnectionError,
    UnsafeBufferError as UnsafeBufferError,
    UpgradeFailedError as UpgradeFailedError,
    WorkerDiedError as WorkerDiedError,
    WorkerStartError as WorkerStartError,
    WrongDescriptorKindError as WrongDescriptorKindError,
)

__all__ = [
    "AddressInUseError",
    "AddressLike",
    "AsyncReadyCallback",
    "AsyncResult",
    "CallbackAdapter",
    "CallbackConnection",
    "Cancellable",
    "CancellableScope",
    "ConnectionBrokenError",
    "ConnectionBusyError",
    "ConnectionClosedError",
    "Credentials",
    "Datagram",
    "DatagramTruncatedError",
    "DescriptorKind",
    "DescriptorStream",
    "DescriptorsRefusedError",
    "DescriptorsTruncatedError",
    "EndOfStreamError",
    "FileDescriptor",
    "HandlerError",
    "IOErrorEnum",
    "JobRefusedError",
    "Message",
    "NotSupportedError",
    "OperationCancelled",
    "PeerDeniedError",
    "PeerGoneError",
    "PeerIdentity",
    "PeerPolicy",
    "PoolClosedError",
    "ReadAheadError",
    "Seals",
    "SendError",
    "SuccessorGoneError",
    "TakeOverError",
    "UnexpectedControlMessageError",
    "UnexpectedDescriptorsError",
    "UnixConnection",
    "UnixConnectionError",
    "UnixCredentialsMessage",
    "UnixDatagramSocket",
    "UnixFDList",
    "UnixFDMessage",
    "UnixListener",
    "UnixServer",
    "UnixSocketAddress",
    "UnsafeBufferError",
    "UpgradeFailedError",
    "WorkerDiedError",
    "WorkerStartError",
    "WrongDescriptorKindError",
    "__version__",
    "connection_pair",
    "open_callback_adapter",
    "open_unix_connection",
    "open_unix_datagram",
    "open_unix_listener",
    "serve_unix",
]

_export(globals())


def load_ipython_extension(ipython: object) -> None:
    """Load :mod:`trio_unixconn.jupyter`; ``%load_ext trio_unixconn`` calls this."""
    from .jupyter import load_ipython_extension as load

    load(ipython)


def unload_ipython_extension(ipython: object) -> None:
    """Unload it; ``%unload_ext trio_unixconn`` calls this."""
    from .jupyter import unload_ipython_extension as unload

    unload(ipython)
