"""Messages between the measuring process and its workers: a length, then msgpack."""

from __future__ import annotations

import os
import select
import struct
import time
from typing import Any

import msgspec

LIMIT = 1 << 30
_HEADER = struct.Struct("<I")


class ConnectionClosedError(Exception):
    """The other side is gone."""


class NoAnswerError(Exception):
    """The other side did not answer in time."""


def send(descriptor: int, message: dict[str, Any]) -> None:
    """Write one message.

    Raises:
        ConnectionClosedError: Nobody reads any more.
    """
    body = msgspec.msgpack.encode(message)
    view = memoryview(_HEADER.pack(len(body)) + body)
    try:
        while view:
            view = view[os.write(descriptor, view) :]
    except BrokenPipeError:
        raise ConnectionClosedError from None


def receive(descriptor: int, timeout: float | None = None) -> dict[str, Any]:
    """Read one message.

    Args:
        descriptor: To read from.
        timeout: Seconds for the whole message; None waits for ever.

    Raises:
        ConnectionClosedError: The other side closed before a whole message.
        NoAnswerError: The time is over.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    (size,) = _HEADER.unpack(_read(descriptor, _HEADER.size, deadline))
    if size > LIMIT:
        raise ConnectionClosedError
    message = msgspec.msgpack.decode(_read(descriptor, size, deadline))
    assert isinstance(message, dict)
    return message


def _read(descriptor: int, size: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise NoAnswerError
        chunk = os.read(descriptor, min(size - len(parts), 1 << 20))
        if not chunk:
            raise ConnectionClosedError
        parts += chunk
    return bytes(parts)
