"""As much of D-Bus as it takes to pass descriptors over a bus, spelled out byte by byte.

Source: https://dbus.freedesktop.org/doc/dbus-specification.html ("Authentication Protocol",
"Message Format")
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import attrs

from tests._helpers.glib import receive_exactly
from trio_unixconn import UnixConnection, UnixFDList, open_unix_connection

METHOD_CALL: Final = 1
METHOD_RETURN: Final = 2
ERROR: Final = 3

# The header fields, and of what type each is: object path, string, number, signature.
PATH: Final = 1
INTERFACE: Final = 2
MEMBER: Final = 3
REPLY_SERIAL: Final = 5
DESTINATION: Final = 6
SENDER: Final = 7
SIGNATURE: Final = 8
UNIX_FDS: Final = 9
TYPES: Final = {
    PATH: b"o",
    INTERFACE: b"s",
    MEMBER: b"s",
    REPLY_SERIAL: b"u",
    DESTINATION: b"s",
    SENDER: b"s",
    SIGNATURE: b"g",
    UNIX_FDS: b"u",
}

Fields = Mapping[int, "str | int"]


@attrs.frozen
class BusMessage:
    """A message from the bus; it owns the file descriptors of the message."""

    kind: int
    serial: int
    fields: Fields
    body: bytes
    fds: UnixFDList


@attrs.define
class Bus:
    """A connection that the bus has authenticated."""

    conn: UnixConnection
    name: str = ""
    _serial: int = 0

    async def send(
        self, kind: int, fields: Fields, body: bytes = b"", fds: Sequence[int] = ()
    ) -> int:
        """Send a message, and return its serial number."""
        self._serial += 1
        if fds:
            fields = {**fields, UNIX_FDS: len(fds)}
        await self.conn.send_message(marshalled(kind, self._serial, fields, body), fds=fds)
        return self._serial

    async def receive(self, kind: int) -> BusMessage:
        """Receive the next message of one kind; skip signals."""
        while True:
            message = await self._receive_any()
            if message.kind == kind:
                return message
            message.fds.close()
            assert message.kind != ERROR, message

    async def call_bus(self, member: str, *arguments: str) -> bytes:
        """Call a method of the bus itself, and return the body of the answer."""
        fields: dict[int, str | int] = {
            PATH: "/org/freedesktop/DBus",
            INTERFACE: "org.freedesktop.DBus",
            MEMBER: member,
            DESTINATION: "org.freedesktop.DBus",
        }
        if arguments:
            fields[SIGNATURE] = "s" * len(arguments)
        body = b""
        for argument in arguments:
            body = padded(body, 4) + string(argument)
        serial = await self.send(METHOD_CALL, fields, body)
        answer = await self.receive(METHOD_RETURN)
        assert answer.fields[REPLY_SERIAL] == serial
        assert answer.fields[SENDER] == "org.freedesktop.DBus"
        return answer.body

    async def _receive_any(self) -> BusMessage:
        # Descriptors travel with the first byte of their message.
        fds: list[int] = []
        start = b""
        while len(start) < 16:
            with await self.conn.receive_message(16 - len(start)) as part:
                assert part.data, "end of stream from the bus"
                start += part.data
                fds += part.fds.steal_fds()
        order = "<" if start[:1] == b"l" else ">"
        _, kind, _, version, size, serial, fields_size = struct.unpack(f"{order}4B3I", start)
        assert version == 1
        rest = await receive_exactly(self.conn, fields_size + -fields_size % 8 + size)
        fields = parsed_fields(rest[:fields_size], order)
        assert fields.get(UNIX_FDS, 0) == len(fds)
        return BusMessage(kind, serial, fields, rest[len(rest) - size :], UnixFDList(fds))


def padded(data: bytes, size: int) -> bytes:
    """Return ``data`` with NULs up to a multiple of ``size``."""
    return data + bytes(-len(data) % size)


def string(text: str) -> bytes:
    """Marshal a string or an object path."""
    return struct.pack("<I", len(text.encode())) + text.encode() + b"\0"


def string_at_start(body: bytes) -> str:
    """Return the string at the start of a body."""
    (size,) = struct.unpack_from("=I", body)
    return body[4 : 4 + size].decode()


def marshalled(kind: int, serial: int, fields: Fields, body: bytes) -> bytes:
    """Marshal a message in little-endian order."""
    array = b""
    for code, value in fields.items():
        # The signature of one type takes 3 bytes, so what follows it is aligned to 4.
        array = padded(array, 8) + bytes([code, 1]) + TYPES[code] + b"\0"
        if isinstance(value, int):
            array += struct.pack("<I", value)
        elif code == SIGNATURE:
            array += bytes([len(value)]) + value.encode() + b"\0"
        else:
            array += string(value)
    start = struct.pack("<4B3I", ord("l"), kind, 0, 1, len(body), serial, len(array))
    return padded(start + array, 8) + body


def parsed_fields(array: bytes, order: str) -> Fields:
    """Return the header fields of a message."""
    fields: dict[int, str | int] = {}
    at = 0
    while at < len(array):
        code, kind = array[at], array[at + 2 : at + 3]
        at += 4
        if kind == b"g":
            size = array[at]
            at += 1
        else:
            (size,) = struct.unpack_from(f"{order}I", array, at)
            at += 4
        if kind == b"u":
            fields[code] = size
        else:
            fields[code] = array[at : at + size].decode()
            at += size + 1
        at += -at % 8
    return fields


async def command(conn: UnixConnection, line: str) -> str:
    """Send one line of the authentication protocol, and return the answer."""
    await conn.send_all(line.encode() + b"\r\n")
    answer = b""
    while not answer.endswith(b"\r\n"):
        more = await conn.receive_some()
        assert more, f"end of stream from the bus after {line!r}"
        answer += more
    return answer.decode().removesuffix("\r\n")


@asynccontextmanager
async def open_bus(path: str) -> AsyncGenerator[Bus, None]:
    """Connect to a bus as the user of this process, and get a name from it."""
    async with await open_unix_connection(path) as conn:
        # The bus expects one NUL byte first, with the credentials of the sender.
        await conn.send_credentials()
        answer = await command(conn, f"AUTH EXTERNAL {str(os.geteuid()).encode().hex()}")
        assert answer.startswith("OK ")
        assert await command(conn, "NEGOTIATE_UNIX_FD") == "AGREE_UNIX_FD"
        await conn.send_all(b"BEGIN\r\n")
        bus = Bus(conn)
        bus.name = string_at_start(await bus.call_bus("Hello"))
        yield bus
