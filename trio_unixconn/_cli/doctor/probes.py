"""How each feature is tried.

Invariant: a feature works only if its effect was observed on real sockets; a version number
proves nothing.

Sources: unix(7), socket(7), recvmsg(2), memfd_create(2), pidfd_open(2), pidfd_send_signal(2),
flock(2), rename(2), proc_pid_fd(5); of Linux, the commits that added SO_PEERGROUPS (4.13),
SO_PEERPIDFD and SO_PASSPIDFD (6.5) and SO_PASSRIGHTS (6.16)
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

import attrs

from ... import _ancillary, _kernel, _memfd
from ..._address import UnixSocketAddress
from ..._credentials import Credentials, peer_credentials
from ..._identity import get_peer_groups, get_peer_security_context, open_peer_pidfd, pid_of
from ..._paths import LONGEST, bindable, connectable
from ...errors import PeerGoneError
from .lab import PROCESS_PATIENCE, Lab, expect, expect_error

SECURITY_MODULES: Final = "/sys/kernel/security/lsm"


@attrs.frozen
class Probe:
    """How one feature is tried.

    Attributes:
      attempt: returns what was observed, or raises.
    """

    name: str
    since: str
    otherwise: str
    attempt: Callable[[Lab], str]
    is_core: bool = False


def sendmsg(lab: Lab) -> str:
    """Python can send and receive control messages."""
    expect(_kernel.HAS_SENDMSG, "this Python has no socket.sendmsg, recvmsg and CMSG_SPACE")
    one, two = lab.pair()
    lab.send(one)
    lab.receive(two)
    return "a byte passed"


def descriptor(lab: Lab) -> str:
    """A descriptor arrives, on the same open file."""
    one, two = lab.pair()
    sent = lab.file()
    lab.send(one, _ancillary.pack_rights([sent]))
    (received,) = lab.receive(two).fds
    expect(os.path.sameopenfile(sent, received), "another file arrived")
    return "an open file passed"


def most_descriptors(lab: Lab) -> str:
    """As many descriptors as the library counts on go in one message."""
    one, _ = lab.pair()
    most = _kernel.SCM_MAX_FD
    lab.send(one, _ancillary.pack_rights([lab.file()] * most))
    return f"a message with {most} was taken"


def close_on_exec(lab: Lab) -> str:
    """A descriptor arrives close-on-exec in one step."""
    expect(_kernel.MSG_CMSG_CLOEXEC != 0, "this Python has no MSG_CMSG_CLOEXEC")
    one, two = lab.pair()
    lab.send(one, _ancillary.pack_rights([lab.file()]))
    (received,) = lab.receive(two, _kernel.MSG_CMSG_CLOEXEC).fds
    expect(not os.get_inheritable(received), "a descriptor arrived inheritable")
    return "a descriptor arrived close-on-exec"


def truncation(lab: Lab) -> str:
    """The kernel reports a descriptor for which there was no free slot."""
    import resource  # not on Windows

    one, two = lab.pair()
    lab.send(one, _ancillary.pack_rights([lab.file()]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(one.fileno())
    os.close(lowest)
    # No number that another thread closes meanwhile is free then. The limit of poll(2), which waits
    # for the message, is the same one.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(lowest, 1), hard))
    try:
        received = lab.receive(two)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    expect(received.truncated and not received.fds, f"got {received} with a full table")
    return "a full descriptor table sets MSG_CTRUNC"


def refused_descriptors(lab: Lab) -> str:
    """Sending a descriptor to a socket that rejects them fails with EPERM; the byte is not sent."""
    option = _kernel.required(_kernel.SO_PASSRIGHTS, "SO_PASSRIGHTS")
    one, two = lab.pair()
    two.setsockopt(_kernel.SOL_SOCKET, option, 0)
    expect_error(
        PermissionError,
        lambda: lab.send(one, _ancillary.pack_rights([lab.file()])),
        "a descriptor was accepted nevertheless",
    )
    lab.send(one)
    expect(not lab.receive(two).fds, "a descriptor arrived nevertheless")
    return "the sender got EPERM, and plain bytes pass"


def peer(lab: Lab) -> str:
    """A socket reports the credentials of its peer."""
    one, _ = lab.pair()
    found = peer_credentials(one.getsockopt)
    expect(found == Credentials(), f"expected {Credentials()}, got {found}")
    return f"pid {found.pid}, uid {found.uid}, gid {found.gid}: this process"


def sent_credentials(lab: Lab) -> str:
    """Credentials that a process sends arrive."""
    one, two = lab.pair()
    two.setsockopt(_kernel.SOL_SOCKET, _passcred(), 1)
    lab.send(one, _ancillary.pack_credentials(Credentials()))
    got = lab.receive(two).credentials
    expect(got == Credentials(), f"expected {Credentials()}, got {got}")
    own = Credentials()
    return f"pid {own.pid}, uid {own.uid}, gid {own.gid} received with a byte"


def attached_credentials(lab: Lab) -> str:
    """The kernel attaches the sender's credentials to a byte that was sent without them."""
    one, two = lab.pair()
    two.setsockopt(_kernel.SOL_SOCKET, _passcred(), 1)
    lab.send(one)
    got = lab.receive(two).credentials
    expect(got == Credentials(), f"expected {Credentials()}, got {got}")
    return "the kernel attached the sender's"


def _passcred() -> int:
    return _kernel.required(_kernel.SO_PASSCRED, "SO_PASSCRED")


def groups(lab: Lab) -> str:
    """A socket reports the groups of its peer."""
    one, _ = lab.pair()
    found = get_peer_groups(one)
    expect(set(found) == set(os.getgroups()), f"expected {os.getgroups()}, got {found}")
    return f"{len(found)} supplementary groups of this process"


def security_context(lab: Lab) -> str:
    """A socket reports the security label of its peer."""
    one, _ = lab.pair()
    _kernel.required(_kernel.SO_PEERSEC, "SO_PEERSEC")
    label = get_peer_security_context(one)
    modules = security_modules()
    expect(label is not None, f"no security module gives labels (active: {modules})")
    return f"{label!r} (active: {modules})"


def security_modules() -> str:
    """Return the names of the active security modules, with commas between them."""
    try:
        with open(SECURITY_MODULES, encoding="ascii") as file:
            return file.read().strip() or "none"
    except OSError as exc:
        return f"unknown, {exc.strerror}"


def sent_pidfd(lab: Lab) -> str:
    """The kernel attaches a pidfd of the sender."""
    option = _kernel.required(_kernel.SO_PASSPIDFD, "SO_PASSPIDFD")
    one, two = lab.pair()
    two.setsockopt(_kernel.SOL_SOCKET, option, 1)
    lab.send(one)
    (pidfd,) = lab.receive(two).pidfds
    _check_own(pid_of(pidfd))
    return "a pidfd of the sender was received"


def peer_pidfd(lab: Lab) -> str:
    """A socket gives a pidfd of its peer."""
    option = _kernel.required(_kernel.SO_PEERPIDFD, "SO_PEERPIDFD")
    one, _ = lab.pair()
    _check_own(pid_of(lab.own(one.getsockopt(_kernel.SOL_SOCKET, option))))
    return "a pidfd of the peer"


def _check_own(pid: int) -> None:
    expect(pid == os.getpid(), f"expected a pidfd of process {os.getpid()}, got one of {pid}")


def reaped_peer(lab: Lab) -> str:
    """A peer that has ended and was reaped is distinguished from the next process with its pid."""
    option = _kernel.required(_kernel.SO_PEERPIDFD, "SO_PEERPIDFD")
    process, sock = lab.child()
    pidfd = open_peer_pidfd(sock)
    lab.own(_kernel.required(pidfd, "SO_PEERPIDFD in this kernel"))
    process.communicate(timeout=PROCESS_PATIENCE)
    try:
        lab.own(sock.getsockopt(_kernel.SOL_SOCKET, option))
        seen = "the kernel gives a pidfd of no process"
    except OSError as exc:
        seen = f"the kernel says {exc.strerror}"
    expect_error(
        PeerGoneError,
        lambda: open_peer_pidfd(sock),
        f"{seen}, which was taken for a living process",
    )
    return f"{seen}; reported as gone"


def signal_by_pidfd(lab: Lab) -> str:
    """A signal 0 to a pidfd shows whether a process is alive."""
    pidfd = lab.own(os.pidfd_open(os.getpid()))
    signal.pidfd_send_signal(pidfd, 0)
    return "this process is alive"


def abstract_name(lab: Lab) -> str:
    """A socket can have a name without a file."""
    name = b"\0trio-unixconn-%d-%s" % (os.getpid(), os.urandom(8).hex().encode())
    listener = lab.listener(name)
    lab.socket().connect(name)
    lab.accept(listener)
    return "listened and connected"


def long_path(lab: Lab) -> str:
    """A path that is too long for a socket's address can be bound and connected to."""
    directory = os.fsencode(os.path.join(lab.directory(), "x" * LONGEST))
    os.mkdir(directory)
    fd = lab.own(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    listener = lab.listener(bindable(directory, fd, b"socket"))
    path = os.path.join(directory, b"socket")
    with connectable(UnixSocketAddress(path)) as name:
        lab.socket().connect(name)
    lab.accept(listener)
    return f"a path of {len(path)} bytes was bound and connected to"


def renamed_path(lab: Lab) -> str:
    """A socket that listens can be given its path in one step, over another."""
    directory = lab.directory()
    path, new = os.path.join(directory, "socket"), os.path.join(directory, "new")
    old = lab.listener(path)
    listener = lab.listener(new)
    os.rename(new, path)
    old.close()
    lab.socket().connect(path)
    lab.accept(listener)
    os.link(path, new)
    return "renamed over another, linked, and connected to"


def silent_until_listen(lab: Lab) -> str:
    """A path accepts no connection before listen, so its mode is set in time."""
    path = os.path.join(lab.directory(), "socket")
    sock = lab.socket()
    sock.bind(path)
    os.chmod(path, 0o600)
    expect_error(
        ConnectionRefusedError,
        lambda: lab.socket().connect(path),
        "a connect passed before listen",
    )
    sock.listen()
    lab.socket().connect(path)
    return "refused before listen, connected after"


def lock(lab: Lab) -> str:
    """A lock on a file keeps a second one out."""
    import fcntl  # not on Windows

    path = os.path.join(lab.directory(), "lock")
    first, second = (
        lab.own(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) for _ in range(2)
    )
    fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
    expect_error(
        BlockingIOError,
        lambda: fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB),
        "two had the same lock",
    )
    return "locked once, and refused the second time"


def sealed(lab: Lab) -> str:
    """Memory can be sealed against any change."""
    fd = lab.own(_memfd.create(b"sealed"))
    _memfd.check(fd)
    expect_error(PermissionError, lambda: os.pwrite(fd, b"x", 0), "sealed memory was written to")
    return "sealed memory was made, and a write refused"


def descriptor_directory(lab: Lab) -> str:
    """The system shows which descriptors this process has."""
    fd = lab.file()
    shown = os.readlink(f"/proc/self/fd/{fd}")
    expect(shown == os.devnull, f"{shown!r} is shown where {os.devnull} is open")
    return f"{len(os.listdir('/proc/self/fd')) - 1} descriptors are open"


_NO_CREDENTIALS: Final = "NotSupportedError where credentials are asked for"
_NO_PIDFD: Final = (
    "open_peer_pidfd() gives None; is_alive(), read_exe() of a PeerIdentity raise "
    "NotSupportedError, because a pid alone may be another process's by then"
)

PROBES: Final = (
    Probe(
        "sendmsg, recvmsg",
        "Python 3.3",
        "NotSupportedError when a connection is made",
        sendmsg,
        is_core=True,
    ),
    Probe(
        "SCM_RIGHTS",
        "every Linux",
        "NotSupportedError where descriptors are sent",
        descriptor,
        is_core=True,
    ),
    Probe(
        "253 descriptors a message",
        "Linux 2.6.38",
        "OSError (EINVAL) from send_fds(); a smaller per_message passes",
        most_descriptors,
    ),
    Probe(
        "MSG_CMSG_CLOEXEC",
        "Linux 2.6.23",
        "descriptors are made close-on-exec as soon as they are here; a program that another "
        "thread starts just then inherits them",
        close_on_exec,
    ),
    Probe(
        "MSG_CTRUNC",
        "every Linux",
        "a lost descriptor is an UnexpectedControlMessageError instead of a "
        "DescriptorsTruncatedError",
        truncation,
    ),
    Probe(
        "SO_PASSRIGHTS = 0",
        "Linux 6.16",
        "with receive_descriptors=False, those that come are closed, and "
        "UnexpectedDescriptorsError is raised",
        refused_descriptors,
    ),
    Probe("SO_PEERCRED", "Linux 2.2", _NO_CREDENTIALS, peer, is_core=True),
    Probe(
        "SCM_CREDENTIALS",
        "Linux 2.2",
        "NotSupportedError from send_credentials(); receive_credentials() answers what the socket "
        "knows of its peer",
        sent_credentials,
        is_core=True,
    ),
    Probe(
        "SO_PASSCRED",
        "Linux 2.2",
        "receive_credentials() answers what the socket knows of its peer",
        attached_credentials,
    ),
    Probe(
        "SO_PEERGROUPS",
        "Linux 4.13",
        "get_peer_groups() raises NotSupportedError; a PeerPolicy sees only the primary group",
        groups,
    ),
    Probe(
        "SO_PEERSEC",
        "Linux 2.6.2",
        "get_peer_security_context() gives None",
        security_context,
    ),
    Probe("SO_PASSPIDFD", "Linux 6.5", "pidfd=True raises NotSupportedError", sent_pidfd),
    Probe("SO_PEERPIDFD", "Linux 6.5", _NO_PIDFD, peer_pidfd),
    Probe("SO_PEERPIDFD of a reaped peer", "Linux 6.5", _NO_PIDFD, reaped_peer),
    Probe(
        "pidfd_send_signal",
        "Linux 5.1, Python 3.9",
        "a peer that was reaped cannot be told from a living one",
        signal_by_pidfd,
    ),
    Probe(
        "abstract names",
        "Linux 2.2",
        "OSError for an abstract name; paths work",
        abstract_name,
    ),
    Probe(
        f"paths over {LONGEST} bytes",
        "Linux 2.6.39",
        "OSError (ENAMETOOLONG); shorter paths work",
        long_path,
    ),
    Probe(
        "rename and link of a socket",
        "every Linux",
        "open_unix_listener() raises OSError; abstract names work",
        renamed_path,
    ),
    Probe(
        "no connect before listen",
        "every Linux",
        "others might connect before the mode of a path is set",
        silent_until_listen,
    ),
    Probe(
        "flock",
        "Linux 2.0",
        "open_unix_listener() raises OSError; abstract names work",
        lock,
    ),
    Probe(
        "memfd_create, seals",
        "Linux 3.17, Python 3.8",
        "NotSupportedError from send_buffer()",
        sealed,
    ),
    Probe(
        "/proc/self/fd",
        "Linux 2.2",
        "paths that are too long for a socket's address are ENAMETOOLONG",
        descriptor_directory,
    ),
)
