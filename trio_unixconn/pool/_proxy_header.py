"""The PROXY protocol, versions 1 and 2: what a balancer says about a client before its first byte.

The parser does no I/O. It is fed bytes, and says how many of them belong to the header. The reader
below it looks at what has arrived (MSG_PEEK) and takes only that, because what follows the header
is the client's.

Invariant: not a byte after the header is read, and no header is longer than MAX_HEADER.

Sources: HAProxy's proxy-protocol.txt, sections 2.1 and 2.2; RFC 3720, appendix B.4 (CRC-32C)
"""

from __future__ import annotations

import functools
import ipaddress
import socket as stdlib_socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import attrs
import trio

from ..errors import ReportedError, UnixConnectionError

if TYPE_CHECKING:
    from .._connection import UnixConnection

#: The versions that a pool can expect; "any" is one of both.
ProxyVersion: TypeAlias = Literal["v1", "v2", "any"]
Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
#: The maximum length of a header, in bytes. One of version 1 has at most MAX_LINE.
MAX_HEADER: Final = 4096
MAX_LINE: Final = 107
#: The time in seconds in which a whole header must arrive. It allows for a lost segment.
HEADER_TIMEOUT: Final = 5.0

_FIXED_LENGTH: Final = 16
_LOCAL: Final = 0
_PROXY: Final = 1
_STREAM: Final = 1
_INET, _INET6, _UNIX = 1, 2, 3
_ADDRESS_LENGTH: Final = {0: 0, _INET: 12, _INET6: 36, _UNIX: 216}
_UNIX_PATH: Final = 108

_TYPE_ALPN: Final = 0x01
_TYPE_AUTHORITY: Final = 0x02
_TYPE_CRC32C: Final = 0x03
_TYPE_NOOP: Final = 0x04
_TYPE_UNIQUE_ID: Final = 0x05
_TYPE_SSL: Final = 0x20
_SUBTYPE_SSL_VERSION: Final = 0x21
_SUBTYPE_SSL_CN: Final = 0x22
_SUBTYPE_SSL_CIPHER: Final = 0x23
_CLIENT_SSL: Final = 0x01
_CLIENT_CERT_CONN: Final = 0x02


class ProxyProtocolError(ReportedError, ValueError):
    """A connection does not begin with the header that it must begin with."""


@attrs.frozen
class ProxyTLS:
    """What a balancer says about the TLS connection of a client that it has decrypted.

    Attributes:
      version: for example "TLSv1.3"; None if the balancer does not say it, as for the others.
      cipher: the name of the cipher.
      common_name: the common name of the client's certificate.
      has_certificate: whether the client has presented a certificate on this connection.
      is_verified: whether the certificate was verified.
    """

    version: str | None
    cipher: str | None
    common_name: str | None
    has_certificate: bool
    is_verified: bool


@attrs.frozen
class ProxyHeader:
    """A PROXY protocol header.

    Attributes:
      version: 1 or 2.
      source: the address of the client, as ``getpeername`` returns it: a host and a port, with two
        zeros more for IPv6, or the path of a Unix socket. None if the balancer does not say it
        (UNKNOWN), or has connected on its own behalf (LOCAL), as for a health check.
      destination: the address that the client has connected to; None likewise.
      is_local: whether the balancer has connected on its own behalf.
      tlvs: the values of version 2 by type; of a type that occurs twice, the last one.
      raw: the bytes of the header.
    """

    version: int
    source: tuple[Any, ...] | str | None
    destination: tuple[Any, ...] | str | None
    is_local: bool = False
    tlvs: Mapping[int, bytes] = attrs.field(factory=dict[int, bytes], repr=False)
    raw: bytes = attrs.field(default=b"", repr=False, eq=False)

    @property
    def unique_id(self) -> bytes | None:
        """The balancer's number for the connection."""
        return self.tlvs.get(_TYPE_UNIQUE_ID)

    @property
    def authority(self) -> str | None:
        """The host name that the client has asked for (SNI)."""
        value = self.tlvs.get(_TYPE_AUTHORITY)
        return None if value is None else _text(value)

    @property
    def alpn(self) -> bytes | None:
        """The application protocol that the client has negotiated, for example ``b"h2"``."""
        return self.tlvs.get(_TYPE_ALPN)

    @property
    def tls(self) -> ProxyTLS | None:
        """What is known of the client's TLS connection; None if there is none."""
        value = self.tlvs.get(_TYPE_SSL)
        if value is None or not value[0] & _CLIENT_SSL:
            return None
        fields = dict(_tlvs_of(value[5:]))
        texts = {kind: _text(field) for kind, field in fields.items()}
        has_certificate = bool(value[0] & _CLIENT_CERT_CONN)
        return ProxyTLS(
            version=texts.get(_SUBTYPE_SSL_VERSION),
            cipher=texts.get(_SUBTYPE_SSL_CIPHER),
            common_name=texts.get(_SUBTYPE_SSL_CN),
            has_certificate=has_certificate,
            is_verified=has_certificate and not any(value[1:5]),
        )


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


class ProxyHeaderParser:
    """Parses one header, which can arrive in pieces.

    Attributes:
      header: the header, as soon as all of it has arrived.
    """

    def __init__(self, version: ProxyVersion = "any") -> None:
        self.header: ProxyHeader | None = None
        self._version = version
        self._data = b""

    def feed(self, data: bytes) -> int:
        """Take bytes that have arrived, and return how many of them belong to the header.

        Raises:
          ProxyProtocolError: they are not the begin of a header, or it is invalid or too long.
        """
        if self.header is not None:
            return 0
        whole = self._data + data
        match whole[:1]:
            case b"P" if self._version != "v2":
                end = _end_of_line(whole)
            case b"\r" if self._version != "v1":
                end = _end_of_block(whole)
            case b"":
                return 0
            case _:
                raise _unexpected(whole)
        if end is None:
            self._data = whole
            return len(data)
        header = (_parse_line if whole[:1] == b"P" else _parse_block)(whole[:end])
        self.header = attrs.evolve(header, raw=whole[:end])
        taken = end - len(self._data)
        self._data = b""
        return taken


def _unexpected(data: bytes) -> ProxyProtocolError:
    return ProxyProtocolError(f"expected a PROXY protocol header, got {data[:32]!r}")


################################################################
# Version 1: one line
################################################################


def _end_of_line(data: bytes) -> int | None:
    if data[:6] != b"PROXY "[: len(data)]:
        raise _unexpected(data)
    end = data.find(b"\r\n", 0, MAX_LINE)
    if end >= 0:
        return end + 2
    if len(data) >= MAX_LINE:
        raise ProxyProtocolError(
            f"expected a PROXY protocol header of at most {MAX_LINE} bytes, got {data[:32]!r}..."
        )
    return None


def _parse_line(line: bytes) -> ProxyHeader:
    match line[:-2].split(b" "):
        case [_, b"UNKNOWN", *_]:
            return ProxyHeader(1, None, None)
        case [_, (b"TCP4" | b"TCP6") as kind, source, destination, source_port, destination_port]:
            parse = _HOSTS[kind]
        case _:
            raise _unexpected(line)
    try:
        return ProxyHeader(
            1,
            _address(parse(source.decode("ascii")), _port(source_port)),
            _address(parse(destination.decode("ascii")), _port(destination_port)),
        )
    except ValueError as exc:
        raise ProxyProtocolError(f"invalid address in a PROXY protocol header: {exc}") from None


_HOSTS: Final[Mapping[bytes, type[ipaddress.IPv4Address | ipaddress.IPv6Address]]] = {
    b"TCP4": ipaddress.IPv4Address,
    b"TCP6": ipaddress.IPv6Address,
}


def _port(text: bytes) -> int:
    port = int(text) if text.isdigit() and len(text) <= 5 else -1
    # No sign, and no zero in front, because a reader must not have to guess the base.
    if not 0 <= port <= 65535 or str(port).encode() != text:
        raise ValueError(f"{text!r} is not a port")
    return port


def _address(host: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> tuple[Any, ...]:
    return (str(host), port) if host.version == 4 else (str(host), port, 0, 0)


################################################################
# Version 2: a binary block
################################################################


def _end_of_block(data: bytes) -> int | None:
    if data[:12] != SIGNATURE[: len(data)]:
        raise _unexpected(data)
    if len(data) < _FIXED_LENGTH:
        return None
    version, command = data[12] >> 4, data[12] & 15
    if version != 2 or command not in (_LOCAL, _PROXY):
        raise ProxyProtocolError(
            f"expected version 2 of the PROXY protocol and command LOCAL or PROXY, got {version} "
            f"and {command}"
        )
    end = _FIXED_LENGTH + int.from_bytes(data[14:16], "big")
    if end > MAX_HEADER:
        raise ProxyProtocolError(
            f"expected a PROXY protocol header of at most {MAX_HEADER} bytes, got one of {end}"
        )
    return end if len(data) >= end else None


def _parse_block(block: bytes) -> ProxyHeader:
    family, transport = block[13] >> 4, block[13] & 15
    if block[12] & 15 == _LOCAL:
        # The addresses are to be ignored, whatever they are.
        rest = block[_FIXED_LENGTH + _ADDRESS_LENGTH.get(family, 0) :]
        return ProxyHeader(2, None, None, is_local=True, tlvs=_checked_tlvs(block, rest))
    length = _ADDRESS_LENGTH.get(family)
    if length is None or (family and transport != _STREAM):
        raise ProxyProtocolError(
            f"expected the addresses of a stream in a PROXY protocol header, got family {family} "
            f"and transport {transport}"
        )
    body = block[_FIXED_LENGTH:]
    if len(body) < length:
        raise ProxyProtocolError(
            f"expected {length} bytes of addresses in a PROXY protocol header, got {len(body)}"
        )
    tlvs = _checked_tlvs(block, body[length:])
    source, destination = _ADDRESSES[family](body[:length])
    return ProxyHeader(2, source, destination, tlvs=tlvs)


def _no_addresses(_: bytes) -> tuple[None, None]:
    return None, None


def _inet_addresses(data: bytes) -> tuple[Any, Any]:
    half = (len(data) - 4) // 2
    family = ipaddress.IPv4Address if half == 4 else ipaddress.IPv6Address
    source_port, destination_port = struct.unpack("!HH", data[-4:])
    return (
        _address(family(data[:half]), source_port),
        _address(family(data[half:-4]), destination_port),
    )


def _unix_addresses(data: bytes) -> tuple[Any, Any]:
    return _unix_path(data[:_UNIX_PATH]), _unix_path(data[_UNIX_PATH:])


def _unix_path(data: bytes) -> str:
    # An abstract name begins with a null byte, and is shown as other programs show it.
    name = data.rstrip(b"\0")
    return _text(b"@" + name[1:] if name[:1] == b"\0" else name.partition(b"\0")[0])


_ADDRESSES: Final = {
    0: _no_addresses,
    _INET: _inet_addresses,
    _INET6: _inet_addresses,
    _UNIX: _unix_addresses,
}


def _tlvs_of(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        end = 3 + int.from_bytes(data[1:3], "big")
        if len(data) < max(3, end):
            raise ProxyProtocolError(
                f"expected a type, a length and {max(0, end - 3)} bytes in a PROXY protocol "
                f"header, got {len(data)} bytes in all"
            )
        yield data[0], data[3:end]
        data = data[end:]


def _checked_tlvs(block: bytes, data: bytes) -> dict[int, bytes]:
    found = {kind: value for kind, value in _tlvs_of(data) if kind != _TYPE_NOOP}
    tls = found.get(_TYPE_SSL)
    if tls is not None:
        if len(tls) < 5:
            raise ProxyProtocolError(
                f"expected at least 5 bytes about TLS in a PROXY protocol header, got {len(tls)}"
            )
        # Later nothing may fail.
        for _ in _tlvs_of(tls[5:]):
            pass
    checksum = found.get(_TYPE_CRC32C)
    if checksum is not None:
        at = len(block) - len(data)
        for kind, value in _tlvs_of(data):
            if kind == _TYPE_CRC32C and len(value) == 4:
                block = b"%b\0\0\0\0%b" % (block[: at + 3], block[at + 7 :])
            at += 3 + len(value)
        expected = crc32c(block).to_bytes(4, "big")
        if checksum != expected:
            raise ProxyProtocolError(
                f"expected the checksum {expected.hex()} in a PROXY protocol header, got "
                f"{checksum.hex()}"
            )
    return found


def _crc_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


@functools.cache
def _crc_table() -> list[int]:
    return [_crc_entry(value) for value in range(256)]


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of some bytes."""
    table, crc = _crc_table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


################################################################
# Connections that are passed on
################################################################


def join_passed(header: ProxyHeader | None, data: bytes) -> bytes:
    """Return the data of a connection that is passed on, after the header that it had."""
    raw = b"" if header is None else header.raw
    return len(raw).to_bytes(4, "big") + raw + data


def split_passed(data: bytes) -> tuple[ProxyHeader | None, bytes]:
    """Return the header and the data of a connection that was passed on."""
    end = 4 + int.from_bytes(data[:4], "big")
    parser = ProxyHeaderParser()
    parser.feed(data[4:end])
    return parser.header, data[end:]


################################################################
# Reading it from a stream
################################################################


async def read_proxy_header(
    stream: trio.SocketStream | UnixConnection, version: ProxyVersion, senders: Sequence[Network]
) -> ProxyHeader:
    """Read a header; what follows it stays in the stream.

    Args:
      stream: a stream that begins with a header.
      version: the versions that are accepted.
      senders: the networks of the hosts that may send one. A Unix socket has no network: the
        policy of its listener decides.

    Raises:
      ProxyProtocolError: the peer may not send a header, or what it has sent is not a valid one, or
        it was not complete after HEADER_TIMEOUT seconds, or the connection has ended before.
    """
    peer: Any = "an unknown address"
    try:
        peer = stream.socket.getpeername()
        check_sender(stream.socket.family, peer, senders)
        with trio.move_on_after(HEADER_TIMEOUT):
            return await _read_header(stream, version)
        raise ProxyProtocolError(
            f"no complete PROXY protocol header after {HEADER_TIMEOUT:g} seconds"
        )
    except (ProxyProtocolError, OSError, trio.BrokenResourceError, UnixConnectionError) as exc:
        # A peer decides when it resets the connection: that is not an error of this program.
        raise ProxyProtocolError(f"connection of {peer!r} refused: {exc}") from None


async def _read_header(
    stream: trio.SocketStream | UnixConnection, version: ProxyVersion
) -> ProxyHeader:
    parser = ProxyHeaderParser(version)
    while parser.header is None:
        data = await stream.socket.recv(MAX_HEADER, stdlib_socket.MSG_PEEK)
        if not data:
            raise ProxyProtocolError("end of stream while waiting for a PROXY protocol header")
        taken = parser.feed(data)
        while taken:
            # It has arrived: nothing of this waits, unless another process reads from the socket.
            part = await stream.receive_some(taken)
            if not part:
                raise ProxyProtocolError("another process has read from the connection")
            taken -= len(part)
    return parser.header


def check_sender(family: int, peer: Any, senders: Sequence[Network]) -> None:
    """Refuse a peer that is in none of the networks; one at a Unix socket needs none.

    Raises:
      ProxyProtocolError: it is not, or it has no network at all (AF_VSOCK).
    """
    if family == stdlib_socket.AF_UNIX:
        return
    if family not in (stdlib_socket.AF_INET, stdlib_socket.AF_INET6):
        raise ProxyProtocolError(f"address family {family} has no networks")
    host = ipaddress.ip_address(peer[0].partition("%")[0])
    mapped = getattr(host, "ipv4_mapped", None) or host
    if not any(mapped in each for each in senders if each.version == mapped.version):
        raise ProxyProtocolError("it is in no network of proxy_from")
