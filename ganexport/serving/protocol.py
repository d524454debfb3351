"""HTTP/1.1 with limits that uvicorn leaves to a proxy in front: slow and endless clients are cut off."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol plus: time for a request's head, its size, and a least pace for reading our answer."""

    head_seconds = 10.0
    head_bytes = 32 << 10
    write_seconds = 30.0
    write_bytes = 32 << 10

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = True
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client that connects and says nothing has ``head_seconds``."""
        super().connection_made(transport)
        # Writing is paused until all is sent: a client that stops before the last bytes is cut off too.
        transport.set_write_buffer_limits(high=0)
        self._start_head_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the timers with the connection."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Count the head's bytes; one that never ends is refused."""
        if self._in_head:
            self._head_size += len(data)
            if self._head_timer is None:
                self._start_head_timer()
        super().data_received(data)
        if self._in_head and self._head_size > self.head_bytes and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is here: its timer stops."""
        self._in_head = False
        self._head_size = 0
        self._stop_head_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Whatever comes now is the next request's head."""
        self._in_head = True
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads slower than we send: it must take ``write_bytes`` in each ``write_seconds``."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It reads again."""
        self._stop_write_timer()
        super().resume_writing()

    def _await_reader(self) -> None:
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.write_seconds, self._check_reader, self._unread())

    def _check_reader(self, before: int) -> None:
        if before - self._unread() < self.write_bytes:
            self.transport.abort()
        else:
            self._await_reader()

    def _unread(self) -> int:
        """Bytes that the client has not acknowledged: ours, and the kernel's, which takes megabytes at a time."""
        held = fcntl.ioctl(self.transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(held, sys.byteorder)

    def _start_head_timer(self) -> None:
        self._stop_head_timer()
        self._head_timer = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
