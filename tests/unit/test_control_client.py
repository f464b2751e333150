"""The control socket's client where there is no daemon, or something else answers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import trio
from outcome import Outcome, capture

from lazyimg.control import ControlClient
from lazyimg.errors import DaemonUnreachable, LazyImgError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def test_no_daemon_is_named_with_the_next_step(path: Path) -> None:
    """Without a socket the error says how to get one."""
    with pytest.raises(DaemonUnreachable, match=r"no daemon answers .*start it with lazyimg mount"):
        ControlClient(path).status()


def test_permission_denied_is_named(path: Path) -> None:
    """A socket of somebody else is not "no daemon": tried as nobody in a child."""
    if os.geteuid() != 0:
        pytest.skip("root is missing")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen()
        for folder in path.parents[:-2]:
            folder.chmod(folder.stat().st_mode | 0o011)
        script = (
            "import os, sys; from pathlib import Path; from lazyimg.control import ControlClient\n"
            "os.setuid(65534)\n"
            "try: ControlClient(Path(sys.argv[1])).status()\n"
            "except Exception as exc: print(type(exc).__name__, exc)"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=30, check=True
        )
    assert done.stdout.startswith("DaemonUnreachable")
    assert "permission denied" in done.stdout


@pytest.mark.parametrize(
    "body",
    [b"[]", b"{", b'{"freed": 1}', b'{"id": "x"}'],
)
def test_foreign_answer_is_refused(body: bytes, path: Path) -> None:
    """Whatever else answers there is no daemon of ours, and never a traceback."""
    with pytest.raises(LazyImgError, match="is no answer of lazyimg's"):
        ask_server_that_says(body, path, lambda client: client.image_facts("x"))


def test_line_without_end_is_refused(path: Path) -> None:
    """A progress line is bounded."""
    with pytest.raises(LazyImgError, match="a line without end"):
        ask_server_that_says(b"x" * (1 << 17), path, lambda client: list(client.prefetch("x")))


def ask_server_that_says(body: bytes, path: Path, ask: Callable[[ControlClient], object]) -> None:
    async def main() -> Outcome[object]:
        async def answer(stream: trio.SocketStream) -> None:
            await stream.receive_some(65536)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            # Broken: the client has seen enough.
            with suppress(trio.BrokenResourceError):
                await stream.send_all(head.encode() + body)

        with trio.socket.socket(socket.AF_UNIX) as listener:
            await listener.bind(str(path))
            listener.listen()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(trio.serve_listeners, answer, [trio.SocketListener(listener)]))
                result = await trio.to_thread.run_sync(capture, ask, ControlClient(path))
                nursery.cancel_scope.cancel()
        return result

    trio.run(main).unwrap()


def test_import_stays_cheap() -> None:
    """Importing the control socket loads neither the web server nor the client library."""
    script = "import lazyimg.control, sys; print({'starlette', 'hypercorn', 'httpx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
