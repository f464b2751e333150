"""The daemon's end of the control socket: starlette on hypercorn's trio worker.

It knows the daemon only as a Protocol.  No failure of a request leaves it, and the web libraries are imported
when serving begins: the daemon answers reads before it answers here.
"""

from __future__ import annotations

import fcntl
import grp
import json
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import trio

from lazyimg.control.messages import ImageFacts, Progress, error_answer
from lazyimg.errors import ConfigError, InUse

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

log = logging.getLogger(__name__)

# Between two progress lines; a bar that moves five times a second looks smooth.
PROGRESS_PAUSE_S = 0.2
# The pause grows with the time since the first line: a week's work has under 250 lines.  A client that is
# stopped and reads none of them then never blocks the server, whose sends hypercorn shields from the daemon's
# end: a Unix socket takes about 270 unread lines (212,992 bytes, 768 for a short one; Linux 6.18, 2026-11).
PROGRESS_PAUSE_SHARE = 0.05
# unix(7): sun_path has 108 bytes, a zero at the end.  rename could make a longer name, which nobody reaches.
SOCKET_PATH_BYTES_MAX = 107

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class Daemon(Protocol):
    """What the control socket needs; `image` is an id or a name that only one image has.

    All methods raise LazyImgError kinds.  A generator that is closed before its end stops its work.
    """

    def status(self) -> dict[str, object]:
        """Return the JSON object of `lazyimg status --json`."""

    async def image_facts(self, image: str) -> ImageFacts:
        """Return what the companion must know of an image that can be presented."""

    async def restart(self) -> int:
        """Let another daemon take over; return this one's pid, since it is about to end."""

    async def give_up_mount(self) -> int:
        """End without unmounting, since another holder has the mount; return this daemon's pid."""

    def prefetch(self, image: str) -> AsyncIterator[Progress]:
        """Fetch all of an image."""

    async def evict(self, image: str) -> int:
        """Drop an image's chunks and return the bytes freed."""

    def verify(self, image: str) -> AsyncIterator[Progress]:
        """Check an image's present chunks, and its source's hash where all are present."""


async def serve_control(
    daemon: Daemon,
    path: Path,
    *,
    mode: int,
    group: str | None,
    is_replaced: bool = False,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control socket at `path` until cancelled; started once it answers.

    Nobody reaches the socket before it has its group and mode.  A socket nobody answers on is replaced.
    is_replaced: nor is one asked that may be a dying daemon's.  Raises InUse if a daemon answers there, or something
    else than a socket is there.
    """
    from hypercorn.config import Config as ServerConfig
    from hypercorn.trio import serve

    listener, own = await trio.to_thread.run_sync(
        partial(_listen, path, mode, group, is_replaced=is_replaced)
    )
    with closing(listener):
        config = ServerConfig()
        # hypercorn owns and closes the descriptor it is given.
        descriptor = os.dup(listener.fileno())
        config.bind = [f"fd://{descriptor}"]
        config.errorlog = logging.getLogger(f"{__name__}.http")
        config.errorlog.setLevel(logging.WARNING)
        try:
            async with trio.open_nursery() as nursery:
                app: Any = _make_app(daemon)
                await nursery.start(partial(serve, app, config))
                # hypercorn makes it inheritable; a child that kept it would answer for a dead daemon.
                os.set_inheritable(descriptor, False)
                task_status.started()
        finally:
            _unlink_if_own(path, own)


def _listen(
    path: Path, mode: int, group: str | None, *, is_replaced: bool
) -> tuple[socket.socket, tuple[int, int]]:
    """Return a listening socket that has appeared at `path`, and its device and inode number."""
    gid = -1 if group is None else _group_id(group)
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(f"control socket {path}: path too long; give a shorter one with --control")
    # In the same folder, so that rename is atomic.
    hidden = path.parent / f".{os.getpid()}.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Whoever may use the socket must reach it, by control_group for one; its own mode keeps the others out.
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        _refuse_open_folder(path)
        hidden.unlink(missing_ok=True)
        listener.bind(str(hidden))
        try:
            # connect() is refused until listen(): the order makes every moment safe.
            os.chown(hidden, -1, gid)
            hidden.chmod(mode)
            listener.listen(100)
            found = hidden.stat()
            with _folder_lock(path.parent):
                _refuse_if_taken(path, is_replaced=is_replaced)
                hidden.rename(path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise
    except OSError as exc:
        listener.close()
        # Python's "AF_UNIX path too long" carries no errno.
        reason = exc.strerror or str(exc)
        raise ConfigError(f"control socket {path}: {reason}; give another with --control") from exc
    except BaseException:
        listener.close()
        raise
    return listener, (found.st_dev, found.st_ino)


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    # Two daemons that start together must not both find the path free.  The folder itself is locked: a lock
    # file would have to stay behind.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_open_folder(path: Path) -> None:
    """Refuse a folder in which somebody else could put a socket of theirs in our socket's place."""
    folder = path.parent.stat()
    is_others = folder.st_uid not in (0, os.geteuid())
    is_writable = folder.st_mode & 0o022 and not folder.st_mode & stat.S_ISVTX
    if is_others or is_writable:
        raise ConfigError(
            f"control socket {path}: others may put a socket of theirs into {path.parent}; "
            "chmod go-w that folder, or give another --control"
        )


def _refuse_if_taken(path: Path, *, is_replaced: bool) -> None:
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise InUse(f"control socket {path}: something else is there; remove it or give another --control")
    if is_replaced:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass  # its queue is full: a daemon is there, and busy
    raise InUse(f"control socket {path}: a daemon answers there; stop it or give another --control")


def _group_id(group: str) -> int:
    if group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as exc:
        raise ConfigError(
            f"config key 'control_group': no group {group!r}; give the name or number of one"
        ) from exc


def _unlink_if_own(path: Path, own: tuple[int, int]) -> None:
    try:
        found = path.lstat()
        if (found.st_dev, found.st_ino) == own:
            path.unlink()
    except OSError as exc:
        # The next daemon replaces what stays behind; there is nothing better to do at the end.
        log.debug("control socket %s stays behind: %s", path, exc)


def _make_app(daemon: Daemon) -> Starlette:
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    async def answer(make: Callable[[], Awaitable[object]]) -> Response:
        try:
            return JSONResponse(await make())
        except Exception as exc:
            status, body = error_answer(exc)
            return JSONResponse(body, status)

    async def status(_request: Request) -> Response:
        async def make() -> object:
            return daemon.status()

        return await answer(make)

    async def image_facts(request: Request) -> Response:
        async def make() -> object:
            return asdict(await daemon.image_facts(_image_of(request)))

        return await answer(make)

    async def evict(request: Request) -> Response:
        async def make() -> object:
            return {"freed_bytes": await daemon.evict(_image_of(request))}

        return await answer(make)

    async def restart(_request: Request) -> Response:
        async def make() -> object:
            return {"daemon_pid": await daemon.restart()}

        return await answer(make)

    async def give_up_mount(_request: Request) -> Response:
        async def make() -> object:
            return {"daemon_pid": await daemon.give_up_mount()}

        return await answer(make)

    async def prefetch(request: Request) -> Any:
        return _ProgressAnswer(lambda: daemon.prefetch(_image_of(request)))

    async def verify(request: Request) -> Any:
        return _ProgressAnswer(lambda: daemon.verify(_image_of(request)))

    async def metrics(_request: Request) -> Response:
        # A daemon serves guests before anybody scrapes it: imported here.
        from lazyimg.metrics import CONTENT_TYPE, render

        try:
            return Response(render(daemon.status()), media_type=CONTENT_TYPE)
        except Exception as exc:
            status, body = error_answer(exc)
            return JSONResponse(body, status)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/v1/status", status),
            Route("/v1/image", image_facts),
            Route("/v1/evict", evict, methods=["POST"]),
            Route("/v1/restart", restart, methods=["POST"]),
            Route("/v1/give-up-mount", give_up_mount, methods=["POST"]),
            Route("/v1/prefetch", prefetch, methods=["POST"]),
            Route("/v1/verify", verify, methods=["POST"]),
        ]
    )


def _image_of(request: Request) -> str:
    image = request.query_params.get("image")
    if not image:
        raise ConfigError("control request names no image; give ?image=<id or name>")
    return image


class _ProgressAnswer:
    """An ASGI response that sends steps as JSON lines; the work stops when the client goes away.

    An error before the first step has its own HTTP status, a later one is the last line.
    """

    def __init__(self, begin: Callable[[], AsyncIterator[Progress]]) -> None:
        self._begin = begin
        self._is_started = False

    async def __call__(self, _scope: object, receive: _Receive, send: _Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_on_disconnect, receive, nursery.cancel_scope)
            try:
                await self._send_steps(send)
            except Exception as exc:
                status, body = error_answer(exc)
                await self._send_line(send, body, status)
            await self._start(send, 200)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            nursery.cancel_scope.cancel()

    @staticmethod
    async def _cancel_on_disconnect(receive: _Receive, work: trio.CancelScope) -> None:
        # The request's body, if any, is dropped unread, part by part.
        while (await receive())["type"] != "http.disconnect":
            pass
        work.cancel()

    async def _send_steps(self, send: _Send) -> None:
        steps = self._begin()
        held: Progress | None = None
        began_s = trio.current_time()
        due_s = began_s
        try:
            async for step in steps:
                held = step
                now_s = trio.current_time()
                if now_s >= due_s:
                    await self._send_line(send, asdict(step), 200)
                    due_s = now_s + max(PROGRESS_PAUSE_S, (now_s - began_s) * PROGRESS_PAUSE_SHARE)
                    held = None
        finally:
            # Left to the garbage collector, the work would go on after the client is gone.
            if (aclose := getattr(steps, "aclose", None)) is not None:
                await aclose()
        if held is not None:
            await self._send_line(send, asdict(held), 200)

    async def _start(self, send: _Send, status: int) -> None:
        if not self._is_started:
            self._is_started = True
            headers = [(b"content-type", b"application/x-ndjson")]
            await send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_line(self, send: _Send, body: object, status: int) -> None:
        await self._start(send, status)
        line = json.dumps(body).encode() + b"\n"
        await send({"type": "http.response.body", "body": line, "more_body": True})
