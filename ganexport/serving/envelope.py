"""What surrounds every request: its id, limits on its body, its log line and its metrics."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from ganexport.serving.admission import Admission
from ganexport.serving.metrics import Log, Metrics

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

BODY_LIMIT = 1 << 20
BODY_SECONDS = 10.0
OPEN_LIMIT = 512
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}\Z")
_JSON = re.compile(rb"\s*application/([a-z0-9.-]+\+)?json\s*(;|\Z)", re.IGNORECASE)
_QUIET = ("/healthz", "/readyz", "/metrics")
#: Refused unparsed while no further sample is admitted: under overload most requests end here, and cost the least.
_BOUNDED = frozenset({"/v1/generate", "/v1/walk"})


class Envelope:
    """ASGI middleware; reads the whole body before the application sees the request.

    Args:
        app: The application.
        admission: Asked whether the server is stopping, and when to come again.
        metrics: Counts every answer.
        log: Gets a line for every answer.
        body_limit: Bytes; more is 413.
        body_seconds: Time for the body to arrive; more is 408.
        open_limit: Requests at a time; more is 503.
    """

    def __init__(
        self,
        app: App,
        *,
        admission: Admission,
        metrics: Metrics,
        log: Log,
        body_limit: int = BODY_LIMIT,
        body_seconds: float = BODY_SECONDS,
        open_limit: int = OPEN_LIMIT,
    ) -> None:
        self._app, self._admission, self._metrics, self._log = app, admission, metrics, log
        self._body_limit, self._body_seconds, self._open_limit = body_limit, body_seconds, open_limit
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request (ASGI 3)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send, self._admission)
        self._open += 1
        try:
            await self._handle(exchange, scope, receive)
        finally:
            self._open -= 1
            self._record(exchange, scope)

    async def _handle(self, exchange: _Exchange, scope: Scope, receive: Receive) -> None:
        if self._open > self._open_limit and scope["path"] not in _QUIET:
            await exchange.refuse(503, "too many requests are open; come again later")
            return
        declared = exchange.header(b"content-length")
        if declared and declared.isdigit() and int(declared[:20]) > self._body_limit:
            await exchange.refuse(413, f"the body is larger than {self._body_limit} bytes")
            return
        try:
            body = await asyncio.wait_for(_read(receive, self._body_limit), self._body_seconds)
        except TimeoutError:
            await exchange.refuse(408, f"the body did not arrive within {self._body_seconds:g} s")
            return
        if body is None:
            await exchange.refuse(413, f"the body is larger than {self._body_limit} bytes")
            return
        if scope["path"] in _BOUNDED and scope["method"] == "POST":
            if self._admission.full:
                refused = self._admission.too_many()
                await exchange.refuse(refused.status, refused.message, keep=True)
                return
            # Not only for clarity: a page of another site cannot send JSON without asking the browser first.
            if not _JSON.match(exchange.header(b"content-type") or b""):
                await exchange.refuse(415, "send JSON with the header content-type: application/json", keep=True)
                return
        await self._app(scope, _replay(body, receive), exchange.send)

    def _record(self, exchange: _Exchange, scope: Scope) -> None:
        seconds = time.perf_counter() - exchange.began
        # The route's pattern, never the path as sent: a metric's labels must stay few.
        route = scope["path"] if scope["path"] in _BOUNDED else getattr(scope.get("route"), "path", "other")
        status = exchange.status or 499
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if scope["path"] in _QUIET and status < 400:
            return
        self._log(
            "request",
            "error" if status == 500 else "info",
            id=exchange.id.decode(),
            method=scope["method"],
            path=scope["path"][:200],
            status=status,
            ms=round(seconds * 1e3, 2),
            **scope.get("log", {}),
        )


class _Exchange:
    """One request's answer on its way out."""

    def __init__(self, scope: Scope, send: Send, admission: Admission) -> None:
        self._scope, self._send, self._admission = scope, send, admission
        self.began = time.perf_counter()
        self.status = 0
        given = self.header(b"x-request-id")
        self.id = given if given and _REQUEST_ID.match(given) else uuid.uuid4().hex.encode()
        scope["request_id"] = self.id.decode()

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower-case) name."""
        value: bytes | None = next((value for key, value in self._scope["headers"] if key == name), None)
        return value

    async def send(self, message: Message) -> None:
        """Pass a message on, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self.id), (b"x-content-type-options", b"nosniff")]
            if self._admission.stopping:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)

    async def refuse(self, status: int, detail: str, *, keep: bool = False) -> None:
        """Answer in the application's place.

        Args:
            status: HTTP's.
            detail: Why.
            keep: The body was read, so the connection may stay; else it closes, and the rest of the body costs nothing.
        """
        body = msgspec.json.encode({"detail": detail})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if not keep:
            headers.append((b"connection", b"close"))
        if status in (429, 503):
            headers.append((b"retry-after", str(self._admission.retry_after()).encode()))
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None when it is larger than the limit."""
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(chunks)
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            return None
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
