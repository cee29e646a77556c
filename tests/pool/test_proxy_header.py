"""The PROXY protocol: its parser, and pools whose connections begin with a header."""

from __future__ import annotations

import functools
import ipaddress
import json
import socket
import struct
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing
from hypothesis import given, strategies as st

from tests._helpers.waiting import until
from trio_unixconn import connection_pair, open_unix_connection, open_unix_listener
from trio_unixconn.pool import ProxyHeader, ProxyTLS, _proxy_header, serve_with_workers
from trio_unixconn.pool._config import PoolConfig
from trio_unixconn.pool._proxy_header import (
    MAX_HEADER,
    SIGNATURE,
    ProxyHeaderParser,
    ProxyProtocolError,
    ProxyVersion,
    check_sender,
    crc32c,
    read_proxy_header,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from trio_unixconn.pool import WorkerServer

TELL = "tests._helpers.pool_handlers:tell_proxy"
IPV4 = bytes([192, 0, 2, 1, 198, 51, 100, 7]) + struct.pack("!HH", 50000, 443)
IPV6 = (
    ipaddress.IPv6Address("2001:db8::1").packed
    + ipaddress.IPv6Address("::1").packed
    + struct.pack("!HH", 50000, 443)
)


def block(body: bytes, *, command: int = 0x21, family: int = 0x11, length: int = -1) -> bytes:
    """Return a header of version 2."""
    length = len(body) if length < 0 else length
    return SIGNATURE + bytes([command, family]) + length.to_bytes(2, "big") + body


def tlv(kind: int, value: bytes) -> bytes:
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def parse(data: bytes, version: ProxyVersion = "any") -> ProxyHeader:
    """Parse a whole header, with bytes after it."""
    parser = ProxyHeaderParser(version)
    assert parser.feed(b"") == 0
    assert parser.feed(data + b"the rest") == len(data)
    assert parser.header is not None
    assert parser.feed(b"more") == 0
    # Byte by byte it is the same.
    slow = ProxyHeaderParser(version)
    for index in range(len(data)):
        assert slow.header is None
        assert slow.feed(data[index : index + 1]) == 1
    assert slow.header == parser.header
    return parser.header


################################################################
# The parser
################################################################


@pytest.mark.parametrize(
    ("line", "source", "destination"),
    [
        (b"TCP4 192.0.2.1 198.51.100.7 50000 443", ("192.0.2.1", 50000), ("198.51.100.7", 443)),
        (b"TCP4 255.255.255.255 0.0.0.0 65535 0", ("255.255.255.255", 65535), ("0.0.0.0", 0)),
        (b"TCP6 2001:db8::1 ::1 50000 443", ("2001:db8::1", 50000, 0, 0), ("::1", 443, 0, 0)),
        (b"UNKNOWN", None, None),
        (b"UNKNOWN ffff::1 what ever 1 2", None, None),
    ],
)
def test_parser_of_version_1(line: bytes, source: object, destination: object) -> None:
    """A line gives the addresses of the client, or none of UNKNOWN."""
    header = parse(b"PROXY " + line + b"\r\n")
    assert header == ProxyHeader(1, cast("Any", source), cast("Any", destination))
    assert (header.unique_id, header.authority, header.alpn, header.tls) == (None,) * 4


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n", "expected a PROXY protocol header, got b'GET / HTTP"),
        (b"PROXX", "expected a PROXY protocol header"),
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 50000\r\n", "expected a PROXY protocol header"),
        (b"PROXY UDP4 192.0.2.1 198.51.100.7 1 2\r\n", "expected a PROXY protocol header"),
        (b"PROXY TCP4 192.0.2.1  198.51.100.7 1 2\r\n", "expected a PROXY protocol header"),
        (b"PROXY TCP4 192.0.2.300 198.51.100.7 1 2\r\n", "192.0.2.300"),
        (b"PROXY TCP4 ::1 198.51.100.7 1 2\r\n", "::1"),
        (b"PROXY TCP6 192.0.2.1 ::1 1 2\r\n", "192.0.2.1"),
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 1 65536\r\n", "b'65536' is not a port"),
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 01 2\r\n", "b'01' is not a port"),
        (b"PROXY TCP4 192.0.2.1 198.51.100.7 +1 2\r\n", r"b'\+1' is not a port"),
        ("PROXY TCP4 192.0.2.1 198.51.100.7 ² 2\r\n".encode(), "is not a port"),
        ("PROXY TCP4 192.0.2.ä 198.51.100.7 1 2\r\n".encode(), "ascii"),
        (b"PROXY UNKNOWN " + b"x" * 100, "at most 107 bytes"),
        (b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", "at most 107 bytes"),
    ],
)
def test_parser_rejects_lines(data: bytes, said: str) -> None:
    """A wrong header of version 1 is rejected, with what was received."""
    with pytest.raises(ProxyProtocolError, match=said):
        ProxyHeaderParser().feed(data)


def test_parser_of_version_2_addresses() -> None:
    """A block gives the addresses of IPv4, IPv6 and Unix sockets, or none."""
    assert parse(block(IPV4)) == ProxyHeader(2, ("192.0.2.1", 50000), ("198.51.100.7", 443))
    assert parse(block(IPV6, family=0x21)) == ProxyHeader(
        2, ("2001:db8::1", 50000, 0, 0), ("::1", 443, 0, 0)
    )
    paths = b"/run/a.sock".ljust(108, b"\0") + b"\0abstract".ljust(108, b"\0")
    assert parse(block(paths, family=0x31)) == ProxyHeader(2, "/run/a.sock", "@abstract")
    unnamed = parse(block(bytes(216), family=0x31))
    assert (unnamed.source, unnamed.destination) == ("", "")
    assert parse(block(b"", family=0)) == ProxyHeader(2, None, None)
    local = ProxyHeader(2, None, None, is_local=True)
    assert parse(block(b"", command=0x20, family=0)) == local
    assert parse(block(IPV4, command=0x20)) == local


def test_parser_of_version_2_values() -> None:
    """The values after the addresses are kept by type, and those that are known have names."""
    tls = (
        b"\x07"
        + bytes(4)
        + tlv(0x21, b"TLSv1.3")
        + tlv(0x23, b"TLS_AES_256_GCM_SHA384")
        + tlv(0x22, "Jörg".encode())
    )
    values = (
        tlv(0x01, b"h2")
        + tlv(0x02, b"example.org")
        + tlv(0x04, b"padding")
        + tlv(0x05, b"42")
        + tlv(0x20, tls)
        + tlv(0xEA, b"own")
    )
    header = parse(block(IPV4 + values))
    assert (header.alpn, header.authority, header.unique_id) == (b"h2", "example.org", b"42")
    assert header.tls == ProxyTLS("TLSv1.3", "TLS_AES_256_GCM_SHA384", "Jörg", True, True)
    assert header.tlvs[0xEA] == b"own"
    assert 0x04 not in header.tlvs
    unverified = parse(block(IPV4 + tlv(0x20, b"\x03\0\0\0\x01"))).tls
    assert unverified == ProxyTLS(None, None, None, has_certificate=True, is_verified=False)
    plain = parse(block(IPV4 + tlv(0x20, b"\x01\0\0\0\0"))).tls
    assert plain == ProxyTLS(None, None, None, has_certificate=False, is_verified=False)
    assert parse(block(IPV4 + tlv(0x20, bytes(5)))).tls is None


def test_parser_checks_the_checksum() -> None:
    """A CRC-32C is checked if there is one."""
    # The check value of CRC-32C.
    assert crc32c(b"123456789") == 0xE3069283
    empty = block(IPV4 + tlv(0x05, b"42") + tlv(0x03, bytes(4)))
    right = empty[:-4] + crc32c(empty).to_bytes(4, "big")
    assert parse(right).unique_id == b"42"
    for wrong in (empty, block(IPV4 + tlv(0x03, b"short"))):
        with pytest.raises(ProxyProtocolError, match="expected the checksum"):
            ProxyHeaderParser().feed(wrong)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\r\n\r\n\0\r\nQUIX", "expected a PROXY protocol header"),
        (block(IPV4, command=0x11), "version 2"),
        (block(IPV4, command=0x22), "command LOCAL or PROXY"),
        (block(IPV4, family=0x12), "the addresses of a stream"),
        (block(IPV4, family=0x41), "the addresses of a stream"),
        (block(IPV4[:-1]), "12 bytes of addresses in a PROXY protocol header, got 11"),
        (block(b"", length=MAX_HEADER - 15), "at most 4096 bytes, got one of 4097"),
        (block(IPV4 + b"\x05\0\x09short"), "9 bytes"),
        (block(IPV4 + b"\x05\0"), "got 2 bytes in all"),
        (block(IPV4 + tlv(0x20, b"1234")), "at least 5 bytes about TLS"),
        (block(IPV4 + tlv(0x20, b"\x01\0\0\0\0\x21\0\x09v")), "9 bytes"),
    ],
)
def test_parser_rejects_blocks(data: bytes, said: str) -> None:
    """A wrong header of version 2 is rejected, and a long one before it has arrived."""
    with pytest.raises(ProxyProtocolError, match=said):
        ProxyHeaderParser().feed(data)


def test_parser_of_one_version_rejects_the_other() -> None:
    """The version is configured, and never guessed."""
    line, binary = b"PROXY UNKNOWN\r\n", block(IPV4)
    assert parse(line, "v1").version == 1
    assert parse(binary, "v2").version == 2
    for data, version in ((line, "v2"), (binary, "v1")):
        with pytest.raises(ProxyProtocolError, match="expected a PROXY protocol header"):
            ProxyHeaderParser(cast("ProxyVersion", version)).feed(data)


@given(st.data())
def test_parser_of_random_bytes(data: st.DataObject) -> None:
    """Whatever arrives, in whatever pieces: a header, an error, or a wait for a bounded rest."""
    begin = data.draw(
        st.sampled_from([b"", b"PROXY ", b"PROXY TCP4 ", SIGNATURE, SIGNATURE + b"\x21\x11\0\x20"])
    )
    whole = begin + data.draw(st.binary(max_size=300))
    parser = ProxyHeaderParser()
    left = whole
    try:
        while left and parser.header is None:
            piece = left[: data.draw(st.integers(1, 60))]
            taken = parser.feed(piece)
            assert 0 <= taken <= len(piece)
            assert taken == len(piece) or parser.header is not None
            left = left[taken:]
    except ProxyProtocolError:
        pass
    else:
        assert parser.header is not None or len(whole) < MAX_HEADER
        if parser.header is not None:
            assert parser.header.tls is None or isinstance(parser.header.tls, ProxyTLS)


################################################################
# Which peers may send one
################################################################


@pytest.mark.parametrize(
    ("host", "networks", "allowed"),
    [
        ("192.0.2.1", ["192.0.2.0/24"], True),
        ("::ffff:192.0.2.1", ["192.0.2.0/24"], True),
        ("192.0.3.1", ["192.0.2.0/24", "::/0"], False),
        ("fe80::1%lo", ["fe80::/10"], True),
        ("192.0.2.1", [], False),
    ],
)
def test_check_sender(host: str, networks: list[str], *, allowed: bool) -> None:
    """Only hosts in one of the networks may send a header."""
    senders = [ipaddress.ip_network(each) for each in networks]
    check = partial(check_sender, socket.AF_INET6, (host, 1, 0, 0), senders)
    if allowed:
        check()
    else:
        with pytest.raises(ProxyProtocolError, match="in no network of proxy_from"):
            check()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"proxy_protocol": "v3", "proxy_from": []}, ValueError, "must be .* got 'v3'"),
        ({"proxy_protocol": "v1"}, ValueError, "require each other"),
        ({"proxy_from": ["127.0.0.0/8"]}, ValueError, "require each other"),
        ({"proxy_protocol": "v1", "proxy_from": "127.0.0.0/8"}, TypeError, "sequence of networks"),
        ({"proxy_protocol": "v1", "proxy_from": ["127.0.0.1/8"]}, ValueError, "has host bits set"),
    ],
)
def test_pool_config_rejects_proxy_options(
    options: dict[str, Any], error: type[Exception], said: str
) -> None:
    """The two options are checked before any process is started."""
    with pytest.raises(error, match=said):
        PoolConfig(TELL, **options)


################################################################
# Pools
################################################################


@asynccontextmanager
async def serving(version: ProxyVersion = "any") -> AsyncGenerator[tuple[WorkerServer, Any], None]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            functools.partial(
                serve_with_workers,
                TELL,
                [listener],
                workers=1,
                proxy_protocol=version,
                proxy_from=["127.0.0.0/25", ipaddress.ip_network("::1/128")],
            )
        )
        yield server, listener.socket.getsockname()
        server.drain(0)


async def ask(address: Any, *parts: bytes, source: str = "127.0.0.1") -> dict[str, Any]:
    """Send bytes in parts, and return what the handler tells; nothing if it was not called."""
    answer = b""
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(*address, local_address=source) as client:
            # A refused connection is reset if something of it is unread.
            with suppress(trio.BrokenResourceError):
                for part in parts:
                    await client.send_all(part)
                    await trio.testing.wait_all_tasks_blocked(0.001)
                await client.send_eof()
                answer = b"".join([chunk async for chunk in client])
    return dict(json.loads(answer)) if answer else {}


async def test_serve_with_workers_with_proxy_protocol() -> None:
    """The handler gets the client that the header tells, and the stream after the header."""
    async with serving() as (server, address):
        told = await ask(address, b"PROXY TCP4 192.0.2.1 198.51.100.7 50000 443\r\nhello")
        assert (told["peer"], told["rest"]) == (["192.0.2.1", 50000], "hello")
        assert (told["version"], told["destination"]) == (1, ["198.51.100.7", 443])
        assert told["proxied_by"] == "127.0.0.1"
        header = block(IPV6 + tlv(0x05, b"42") + tlv(0x02, b"example.org"), family=0x21)
        told = await ask(address, header[:7], header[7:20], header[20:] + b"he", b"llo")
        assert (told["peer"], told["rest"]) == (["2001:db8::1", 50000, 0, 0], "hello")
        assert (told["unique_id"], told["authority"]) == ("42", "example.org")
        for data in (b"PROXY UNKNOWN\r\n", block(b"", command=0x20, family=0)):
            told = await ask(address, data)
            assert told["peer"][0] == told["proxied_by"] == "127.0.0.1"
            assert told["header"]
        assert server.statistics().failed == 0


async def test_serve_with_workers_refuses_connections_without_a_header(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such connections are closed, logged on one line and counted, and the others are served."""
    async with serving("v2") as (server, address):
        assert await ask(address, b"GET / HTTP/1.1\r\n\r\n") == {}
        assert await ask(address, b"PROXY UNKNOWN\r\n") == {}
        assert await ask(address, block(IPV4)[:-1]) == {}
        assert await ask(address, block(IPV4) + b"hello", source="127.0.0.200") == {}
        assert (await ask(address, block(IPV4) + b"hello"))["rest"] == "hello"
        await until(lambda: server.statistics().failed == 4 and server.statistics().handled == 1)
    failures = [each for each in caplog.messages if "failed" in each]
    assert len(failures) == 4
    assert "expected a PROXY protocol header, got b'GET / HTTP" in failures[0]
    assert "end of stream while waiting for a PROXY protocol header" in failures[2]
    assert "('127.0.0.200', " in failures[3]
    assert "it is in no network of proxy_from" in failures[3]
    assert not any("Traceback" in each for each in failures)


def test_check_sender_of_other_families() -> None:
    """A Unix socket needs no network; what has none otherwise is refused."""
    check_sender(socket.AF_UNIX, "", [])
    with pytest.raises(ProxyProtocolError, match="has no networks"):
        check_sender(socket.AF_VSOCK, (2, 1), [ipaddress.ip_network("0.0.0.0/0")])


async def test_read_proxy_header_of_a_connection_that_is_reset() -> None:
    """That is what a peer decides: one line, as for a header that is wrong."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    senders = [ipaddress.ip_network("127.0.0.0/8")]
    async with listener:
        for begin in (b"", b"PROXY "):
            client = socket.create_connection(listener.socket.getsockname())
            async with await listener.accept() as stream:
                client.sendall(begin)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                async with trio.open_nursery() as nursery:

                    async def reset(client: socket.socket = client) -> None:
                        await trio.testing.wait_all_tasks_blocked()
                        client.close()

                    nursery.start_soon(reset)
                    with pytest.raises(ProxyProtocolError, match=r"connection of .* refused: "):
                        await read_proxy_header(stream, "any", senders)
            # It was reset before.
        client = socket.create_connection(listener.socket.getsockname())
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        async with await listener.accept() as stream:
            client.close()
            with pytest.raises(ProxyProtocolError, match=r"connection of .* refused: "):
                await read_proxy_header(stream, "any", senders)


async def test_read_proxy_header_that_another_process_takes() -> None:
    """What was seen is gone when it is read: the connection is refused, without a busy loop."""

    class Socket:
        family = socket.AF_UNIX

        def getpeername(self) -> str:
            return ""

        async def recv(self, _: int, __: int) -> bytes:
            await trio.lowlevel.checkpoint()
            return b"PROXY UNKNOWN\r\n"

    class Stream:
        socket = Socket()

        async def receive_some(self, _: int) -> bytes:
            await trio.lowlevel.checkpoint()
            return b""

    with pytest.raises(ProxyProtocolError, match="another process"):
        await read_proxy_header(cast("Any", Stream()), "any", [])


async def test_read_proxy_header_with_file_descriptors() -> None:
    """A header brings no file descriptors; they are closed."""
    one, two = connection_pair()
    async with one, two:
        await one.send_message(b"PROXY UNKNOWN\r\n", fds=[0])
        with pytest.raises(ProxyProtocolError, match="file descriptor"):
            await read_proxy_header(two, "any", [])


async def test_read_proxy_header_after_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that sends a part of a header, and then nothing, is refused after a while."""
    monkeypatch.setattr(_proxy_header, "HEADER_TIMEOUT", 0.05)
    here, there = socket.socketpair()
    with there:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(here))
        async with stream:
            there.sendall(b"PROXY TCP4 ")
            with pytest.raises(ProxyProtocolError, match=r"no complete .* after 0\.05 seconds"):
                await read_proxy_header(stream, "any", [])


async def test_serve_with_workers_with_proxy_protocol_on_a_unix_socket(tmp_path: Path) -> None:
    """A peer at a Unix socket may send a header, whatever the networks."""
    listener = await open_unix_listener(tmp_path / "socket")
    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            functools.partial(
                serve_with_workers,
                TELL,
                [listener],
                workers=1,
                proxy_protocol="any",
                proxy_from=[],
            )
        )
        async with await open_unix_connection(tmp_path / "socket") as client:
            paths = b"/run/client".ljust(108, b"\0") + bytes(108)
            await client.send_all(block(paths, family=0x31) + b"hello")
            await client.send_eof()
            told = json.loads(b"".join([chunk async for chunk in client]))
        assert (told["peer"], told["rest"]) == ("/run/client", "hello")
        server.drain(0)
