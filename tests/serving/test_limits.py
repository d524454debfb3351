"""Backpressure, slow and hostile clients, failing engines: never a 500, never a stall."""

from __future__ import annotations

import asyncio
import random
import socket
import string
import threading
import time
from typing import Any

import pytest
from serving_helpers import InProcess

from ganexport.serving.engine import Answer, EngineSettings
from ganexport.serving.gateway import ReplicaLostError
from ganexport.serving.protocol import GuardedProtocol


class Slow(InProcess):
    """Takes its time, or fails, before it generates."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        super().__init__(EngineSettings(max_batch=8, max_delay=0.0))
        self.seconds, self.error = seconds, error
        self.reachable = True

    async def generate(self, version: Any, job: Any) -> Any:
        await asyncio.sleep(self.seconds)
        if self.error:
            raise self.error
        return await super().generate(version, job)

    async def ping(self) -> bool:
        if not self.reachable:
            raise ConnectionError
        return True


def raw(port: int, data: bytes, *, seconds: float = 5.0) -> bytes:
    """Send bytes as they are; everything that comes back until the server closes or goes quiet."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.settimeout(seconds)
        received = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(65536):
                received += chunk
        except (TimeoutError, ConnectionError):
            pass
        return received


def test_more_than_the_limit_is_429_at_once_and_the_admitted_are_answered(make_local, artifact) -> None:
    server = make_local(artifact, replicas=Slow(0.5), limit=8)
    replies = []
    threads = [
        threading.Thread(target=lambda seed=seed: replies.append(server.client.generate(seed=seed, count=4)))
        for seed in range(6)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(reply.status for reply in replies) == [200, 200, 429, 429, 429, 429]
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status == 429)
    # The places are free again; and one request larger than the limit may come alone.
    assert server.client.generate(seed=1, count=20).status == 200
    assert server.admission.pending == 0


def test_a_request_that_takes_too_long_is_503(make_local, artifact) -> None:
    server = make_local(artifact, replicas=Slow(5.0), timeout=0.2)
    reply = server.client.generate(seed=1)
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    assert server.admission.pending == 0


@pytest.mark.parametrize("error", [RuntimeError("a secret of the engine"), ReplicaLostError("the replicas died")])
def test_an_engine_that_fails_is_503_and_its_reason_stays_in_the_log(make_local, artifact, error) -> None:
    server = make_local(artifact, replicas=Slow(error=error))
    reply = server.client.generate(seed=1)
    assert reply.status == 503
    assert "secret" not in reply.json["detail"]
    assert ("secret" in server.log.getvalue()) == isinstance(error, RuntimeError)
    server.replicas.error = None
    assert server.client.generate(seed=1).status == 200


def test_readiness_follows_the_replicas_and_draining(make_local, artifact) -> None:
    server = make_local(artifact, replicas=Slow())

    def status_becomes(wanted: int) -> bool:
        deadline = time.monotonic() + 5
        while server.client.request("/readyz").status != wanted:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    assert status_becomes(200)
    server.replicas.reachable = False
    assert status_becomes(503)
    assert server.client.request("/healthz").status == 200
    server.replicas.reachable = True
    assert status_becomes(200)
    server.admission.stopping = True  # the delay before the drain: not ready, and still serving
    assert status_becomes(503)
    reply = server.client.generate(seed=1)
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    server.admission.draining = True
    reply = server.client.generate(seed=1)
    assert (reply.status, reply.headers["connection"]) == (503, "close")


def test_bodies_that_are_large_endless_or_slow(local) -> None:
    assert local.client.request("/v1/generate", b"x" * 70_000).status == 413
    head = b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    assert b" 413 " in raw(local.port, head + b"Content-Length: 99999999999\r\n\r\n{")
    chunk = b"1000\r\n" + b"y" * 4096 + b"\r\n"
    assert b" 413 " in raw(local.port, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 20)
    began = time.monotonic()
    assert b" 408 " in raw(local.port, head + b"Content-Length: 100\r\n\r\n{")
    assert time.monotonic() - began < 4


def test_heads_that_are_slow_endless_or_nonsense(local) -> None:
    began = time.monotonic()
    assert raw(local.port, b"") == b""
    assert raw(local.port, b"GET / HT") == b""
    assert raw(local.port, b"\r\n\r\n") == b""
    assert time.monotonic() - began < 9
    endless = b"GET / HTTP/1.1\r\n" + b"X-Filler: " + b"z" * 1000 + b"\r\n"
    assert b" 431 " in raw(local.port, endless + (b"X-Filler: " + b"z" * 1000 + b"\r\n") * 400)
    assert b" 400 " in raw(local.port, b"\x00\xff not http\r\n\r\n")
    assert local.client.generate(seed=1).status == 200


def test_slow_clients_do_not_keep_others_waiting(make_local, artifact) -> None:
    server = make_local(artifact, body_seconds=60.0)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for connection in slow:
        connection.sendall(b"POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    began = time.monotonic()
    assert server.client.generate(seed=1).status == 200
    assert time.monotonic() - began < 30  # they have twice that
    [connection.close() for connection in slow]


POST = "POST /v1/generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


class Large(Slow):
    """Answers with more than the buffers between two sockets hold."""

    size = 24 << 20

    async def generate(self, version: Any, job: Any) -> Any:
        return Answer(bytes(self.size), "application/x-npy", 1)


@pytest.mark.parametrize("reads", [True, False])
def test_a_slow_reader_is_waited_for_and_one_that_stopped_is_not(make_local, artifact, monkeypatch, reads) -> None:
    monkeypatch.setattr(GuardedProtocol, "write_seconds", 0.3)
    server = make_local(artifact, replicas=Large())
    body = b'{"seed": 1}'
    head = f"{POST}Content-Length: {len(body)}"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
        received, began = 0, time.monotonic()
        if not reads:
            time.sleep(1.5)
        try:
            while chunk := connection.recv(1 << 20):
                received += len(chunk)
                if reads and time.monotonic() - began < 1.5:  # five times as long as may pass without progress
                    time.sleep(0.05)
        except ConnectionResetError:
            pass
    assert (received > Large.size) is reads


def test_a_reader_that_stops_just_before_the_end_is_cut_off(make_local, artifact, monkeypatch) -> None:
    monkeypatch.setattr(GuardedProtocol, "write_seconds", 0.3)
    replicas = Large()
    server = make_local(artifact, replicas=replicas)
    server.server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)

    def stalled() -> Any:
        """A connection that was asked for an answer, and the server's end of it."""
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(POST.encode() + b"Content-Length: 11\r\n\r\n" + b'{"seed": 1}')
        time.sleep(0.2)
        (there,) = server.server.server_state.connections
        return connection, there.transport

    first, transport = stalled()
    kernel = Large.size - transport.get_write_buffer_size()  # what the kernels take
    first.close()
    time.sleep(0.2)
    replicas.size = kernel + (30 << 10)
    second, transport = stalled()
    assert 0 < transport.get_write_buffer_size() < 64 << 10
    deadline = time.monotonic() + 5
    while server.server.server_state.connections:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    second.close()


def hostile_value(random_: random.Random, depth: int = 0) -> Any:
    kinds: list[Any] = [
        lambda: random_.choice([0, -1, 1, 2**31, 2**63, 2**64, 2**64 - 1, -(2**70), 10**400]),
        lambda: random_.choice([0.5, -0.0, 1e308, float("nan"), float("inf"), -float("inf")]),
        lambda: random_.choice([None, True, False]),
        lambda: "".join(random_.choices(string.printable + "\ud800\u0000é漢", k=random_.randrange(20))),
    ]
    if depth < 3:
        kinds += [
            lambda: [hostile_value(random_, depth + 1) for _ in range(random_.randrange(6))],
            lambda: {str(hostile_value(random_, 3))[:10]: hostile_value(random_, depth + 1) for _ in range(2)},
        ]
    return random_.choice(kinds)()


def hostile_body(random_: random.Random) -> bytes:
    import json

    if random_.random() < 0.2:
        return random_.choice(
            [b"", b"{", b"[" * 5000, b"\xff\xfe", b'{"seed":' + b"9" * 5000 + b"}", b"null", b'{"a":' * 2000, b"\x00"]
        )
    fields = ["seed", "seeds", "count", "start", "labels", "truncation", "format", "from_seed", "to_seed", "steps", "x"]
    body = {name: hostile_value(random_) for name in random_.sample(fields, random_.randrange(5))}
    if random_.random() < 0.5:
        body.setdefault("seed", 1)
    return json.dumps(body).encode("utf-8", "surrogatepass")


def attack(server: Any, count: int) -> dict[int, int]:
    random_ = random.Random(20)
    statuses: dict[int, int] = {}
    for _ in range(count):
        path = random_.choice(["/v1/generate", "/v1/generate", "/v1/walk", "/v1/images/%s", "/v1/images/%s?label=%s"])
        if "%s" in path:
            values = ["1", "-1", "nan", "%00", "1e9", "9" * 400, "a/b", "..", "1?truncation=nan", "1?format=gif", "4"]
            path = path.replace("%s", random_.choice(values), 1).replace("%s", random_.choice(values[:4]), 1)
            reply = server.client.request(path, timeout=20)
        else:
            kind = random_.choice(["application/json", "text/plain", "multipart/form-data; boundary=x", "é"])
            reply = server.client.request(path, hostile_body(random_), {"content-type": kind}, timeout=20)
        statuses[reply.status] = statuses.get(reply.status, 0) + 1
    return statuses


def test_hostile_requests_never_get_a_500(local) -> None:
    statuses = attack(local, 400)
    assert set(statuses) <= {200, 400, 404, 413, 415, 422}, statuses
    assert statuses[422] + statuses[415] > 200


@pytest.mark.slow
def test_ten_thousand_hostile_requests(local) -> None:
    statuses = attack(local, 10_000)
    assert set(statuses) <= {200, 400, 404, 413, 415, 422}, statuses
    assert local.client.generate(seed=1).status == 200
    assert local.admission.pending == 0
