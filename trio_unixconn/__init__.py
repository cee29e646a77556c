"""trio_unixconn: Unix-domain connections for trio.

Open files, sockets and proof of identity from one process to another on the same machine:
``Gio.UnixConnection``, awaitable, cancellable and without leaks.
"""

from ._address import UnixSocketAddress as UnixSocketAddress
from ._callbacks import (
    AsyncReadyCallback as AsyncReadyCallback,
    AsyncResult as AsyncResult,
    CallbackAdapter as CallbackAdapter,
    CallbackConnection as CallbackConnection,
    open_callback_adapter as open_callback_adapter,
)
from ._cancellable import Cancellable as Cancellable, CancellableScope as CancellableScope
from ._client import open_unix_connection as open_unix_connection
from ._connection import (
    FileDescriptor as FileDescriptor,
    UnixConnection as UnixConnection,
    connection_pair as connection_pair,
)
from ._credentials import Credentials as Credentials
from ._listener import UnixListener as UnixListener, open_unix_listener as open_unix_listener
from .errors import (
    ConnectionBrokenError as ConnectionBrokenError,
    ConnectionBusyError as ConnectionBusyError,
    ConnectionClosedError as ConnectionClosedError,
    DescriptorsRefusedError as DescriptorsRefusedError,
    DescriptorsTruncatedError as DescriptorsTruncatedError,
    EndOfStreamError as EndOfStreamError,
    IOErrorEnum as IOErrorEnum,
    NotSupportedError as NotSupportedError,
    OperationCancelled as OperationCancelled,
    UnexpectedControlMessageError as UnexpectedControlMessageError,
    UnexpectedDescriptorsError as UnexpectedDescriptorsError,
    UnixConnectionError as UnixConnectionError,
)

__version__ = "0.1.0"

__all__ = [
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
    "DescriptorsRefusedError",
    "DescriptorsTruncatedError",
    "EndOfStreamError",
    "FileDescriptor",
    "IOErrorEnum",
    "NotSupportedError",
    "OperationCancelled",
    "UnexpectedControlMessageError",
    "UnexpectedDescriptorsError",
    "UnixConnection",
    "UnixConnectionError",
    "UnixListener",
    "UnixSocketAddress",
    "__version__",
    "connection_pair",
    "open_callback_adapter",
    "open_unix_connection",
    "open_unix_listener",
]
