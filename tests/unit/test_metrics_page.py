"""The page on a TCP port, on streams in memory: what it answers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
import trio.testing

from lazyimg.control.metricspage import CONNECTION_TIMEOUT_S, REQUEST_BYTES_MAX, MetricsPage
from lazyimg.errors import CacheUnusable


def page_of(body: bytes | Exception) -> MetricsPage:
    def render() -> bytes:
        if isinstance(body, Exception):
            raise body
        return body

    return MetricsPage(render, "text/x")


async def asked(page: MetricsPage, *parts: bytes) -> bytes:
    """Return what a client gets that sends these parts."""
    client, server = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            async with server:
                await page.answer(server)

        nursery.start_soon(serve)
        for part in parts:
            await client.send_all(part)
        return bytes(b"".join([got async for got in client]))


async def test_page_is_there() -> None:
    """GET /metrics is answered, in one part or several, with a query or without."""
    got = await asked(page_of(b"x 1\n"), b"GET /metrics?a=b HT", b"TP/1.1\r\nHost: h\r\n\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.split(b"\r\n") == [
        b"HTTP/1.1 200 OK",
        b"Content-Type: text/x",
        b"Content-Length: 4",
        b"Connection: close",
    ]
    assert body == b"x 1\n"


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /v1/status HTTP/1.1", b"404"),
        (b"GET /metrics/../v1/status HTTP/1.1", b"404"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"nonsense", b"400"),
        (b"", b"400"),
    ],
)
async def test_nothing_else_is_there(request_line: bytes, status: bytes) -> None:
    """Every other path, method or line is an error, and says nothing of the daemon."""
    got = await asked(page_of(b"secret"), request_line + b"\r\n\r\n")
    assert got.split()[1] == status
    assert b"secret" not in got


async def test_request_without_end_is_refused() -> None:
    """[I5] A request is read up to a limit."""
    got = await asked(page_of(b"secret"), b"GET /metrics HTTP/1.1\r\n" + b"x" * REQUEST_BYTES_MAX)
    assert got.split()[1] == b"400"


async def test_silent_client_is_let_go(autojump_clock: trio.abc.Clock) -> None:
    """[I5] Who sends half a request is waited for no longer than a limit."""
    began_s = trio.current_time()
    assert await asked(page_of(b"x"), b"GET /met") == b""
    assert trio.current_time() - began_s == CONNECTION_TIMEOUT_S


@pytest.mark.parametrize(
    ("error", "status"), [(CacheUnusable("cache c: broken; do x"), b"503"), (RuntimeError("secret"), b"500")]
)
async def test_failure_ends_the_connection_only(
    error: Exception, status: bytes, expected_warnings: Callable[..., None]
) -> None:
    """[I6] What fails inside is an answer, and a traceback in the log where it was not foreseen."""
    expected_warnings("metrics failed in an unforeseen way", required=status == b"500")
    got = await asked(page_of(error), b"GET /metrics HTTP/1.1\r\n\r\n")
    assert got.split()[1] == status
    assert b"secret" not in got
