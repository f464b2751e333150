"""The metrics on a TCP port, for a Prometheus that cannot reach the control socket; nothing else is there.

Anybody on the network may knock, so what they can take is bounded: connections, bytes and time (I5).  Own code
and not the control socket's server, which has no limit of connections.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from lazyimg.errors import LazyImgError

logger = logging.getLogger(__name__)

# At once; others wait in the kernel's queue, whose limit is its own.
CONNECTIONS_MAX = 8
# A request has a few lines; whoever sends more, or takes longer, is not Prometheus.
REQUEST_BYTES_MAX = 8 << 10
CONNECTION_TIMEOUT_S = 10.0
# The port may be taken, by the daemon that this one replaces for one; it is tried again this often.
LISTEN_PAUSE_S = 5.0

Render = Callable[[], bytes]


async def serve_metrics(render: Render, host: str, port: int, content_type: str) -> None:
    """Serve what `render` returns at http://host:port/metrics, until cancelled; a port that is taken is waited for."""
    is_told = False
    while True:
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
            break
        except OSError as exc:
            if not is_told:
                logger.warning(
                    "metrics_listen %s:%d: %s; trying again every %g s", host, port, exc, LISTEN_PAUSE_S
                )
            is_told = True
            await trio.sleep(LISTEN_PAUSE_S)
    page = MetricsPage(render, content_type)
    places = trio.Semaphore(CONNECTIONS_MAX)
    async with trio.open_nursery() as nursery:
        for listener in listeners:
            nursery.start_soon(_accept, listener, page, places)


async def _accept(listener: trio.SocketListener, page: MetricsPage, places: trio.Semaphore) -> None:
    async with listener, trio.open_nursery() as nursery:
        while True:
            await places.acquire()
            try:
                stream = await listener.accept()
            except OSError as exc:
                # No descriptor left, for one: guests come first.
                places.release()
                logger.warning("metrics_listen: %s", exc)
                await trio.sleep(LISTEN_PAUSE_S)
                continue
            nursery.start_soon(_answer, stream, page, places)


async def _answer(stream: trio.SocketStream, page: MetricsPage, places: trio.Semaphore) -> None:
    try:
        async with stream:
            await page.answer(stream)
    finally:
        places.release()


class MetricsPage:
    """Answers one HTTP/1.1 request a connection (RFC 9112), and closes it."""

    def __init__(self, render: Render, content_type: str) -> None:
        self._render = render
        self._content_type = content_type

    async def answer(self, stream: trio.abc.Stream) -> None:
        """Answer the request on a stream; whatever goes wrong is the client's loss."""
        with trio.move_on_after(CONNECTION_TIMEOUT_S):
            try:
                request = b""
                while b"\r\n\r\n" not in request and len(request) < REQUEST_BYTES_MAX:
                    received = await stream.receive_some(REQUEST_BYTES_MAX)
                    if not received:
                        return
                    request += received
                await stream.send_all(self._response(request))
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    def _response(self, request: bytes) -> bytes:
        line = request.partition(b"\r\n")[0].split()
        target = line[1].partition(b"?")[0] if len(line) == 3 else b""
        if b"\r\n\r\n" not in request or len(line) != 3:
            return _written("400 Bad Request", b"not a request\n")
        if target != b"/metrics":
            return _written("404 Not Found", b"only /metrics is here\n")
        if line[0] != b"GET":
            return _written("405 Method Not Allowed", b"only GET\n")
        try:
            body = self._render()
        except LazyImgError as exc:
            return _written("503 Service Unavailable", f"{exc}\n".encode())
        except Exception:
            # It must not end the daemon (I6).
            logger.exception("metrics failed in an unforeseen way")
            return _written("500 Internal Server Error", b"see the daemon's log\n")
        return _written("200 OK", body, self._content_type)


def _written(status: str, body: bytes, content_type: str = "text/plain; charset=utf-8") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body
