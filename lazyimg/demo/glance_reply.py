"""How the embedded Glance sends an image's bytes, and how it goes wrong on purpose."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lazyimg.demo.faults import FaultRule
from lazyimg.demo.glance_images import BLOCK_SIZE_BYTES


class DataReply(Response):
    """`[start, stop)` of a file, or the part of it that a fault lets through.

    A file shorter than its record makes a body shorter than announced, on a connection left open: as real.
    """

    def __init__(
        self,
        path: Path,
        start: int,
        stop: int,
        status: int,
        headers: dict[str, str],
        fault: FaultRule | None,
    ) -> None:
        super().__init__(None, status, headers | {"Content-Length": str(stop - start)})
        self._path, self._start, self._stop, self._fault = path, start, stop, fault

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send status, headers and body."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        fault = self._fault
        breaks_at = self._stop
        if fault is not None and fault.action in ("short_body", "stall"):
            breaks_at = min(self._start + fault.bytes, self._stop)
        file = await trio.to_thread.run_sync(os.open, self._path, os.O_RDONLY)
        try:
            reached = await _send_file(send, file, self._start, breaks_at)
            if fault is not None and fault.action == "short_body":
                return drop_connections(lambda _, peer: peer == tuple(scope["client"]))
            if fault is not None and fault.action == "stall":
                if await _is_gone_after(receive, fault.seconds):
                    return None
                reached = await _send_file(send, file, reached, self._stop)
        finally:
            os.close(file)
        if reached < self._stop:
            await _is_gone_after(receive, None)
            return None
        await send({"type": "http.response.body", "body": b""})
        return None


async def befall(fault: FaultRule, scope: Scope, receive: Receive, send: Send) -> bool:
    """Do what needs no knowledge of the image; True when that was the answer."""
    match fault.action:
        case "status":
            await Response(status_code=fault.status or 503, headers=dict(fault.headers))(scope, receive, send)
        case "redirect":
            await Response(status_code=302, headers={"Location": fault.location})(scope, receive, send)
        case "empty_204":
            await Response(status_code=204)(scope, receive, send)
        case "reset":
            drop_connections(lambda _, peer: peer == tuple(scope["client"]))
        case "delay":
            return await _is_gone_after(receive, fault.seconds)
        case _:
            return False
    return True


def drop_connections(is_chosen: Callable[[tuple[object, ...], tuple[object, ...]], bool]) -> None:
    """Shut down this process's TCP connections chosen by their own and their peer's address.

    ASGI has no word for ending a connection in the middle; the descriptors of the process have.
    """
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            connection = socket.socket(fileno=os.dup(int(name)))
        except OSError:
            # Closed since it was listed: the listing's own descriptor is one of them.
            continue
        with connection:
            try:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and is_chosen(
                    connection.getsockname()[:2], connection.getpeername()[:2]
                ):
                    connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # A listening socket, or one whose peer has gone.
                continue


async def _send_file(send: Send, file: int, start: int, stop: int) -> int:
    while start < stop:
        block = await trio.to_thread.run_sync(os.pread, file, min(stop - start, BLOCK_SIZE_BYTES), start)
        if not block:
            break
        await send({"type": "http.response.body", "body": block, "more_body": True})
        start += len(block)
    return start


async def _is_gone_after(receive: Receive, seconds: float | None) -> bool:
    """Send nothing for `seconds`, None for ever; True as soon as the client has gone away."""
    with trio.move_on_after(float("inf") if seconds is None else seconds):
        while (await receive())["type"] != "http.disconnect":
            pass
        return True
    return False
