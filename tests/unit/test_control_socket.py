"""The control socket itself: whose it is, what else may stand in its place, who may ask, and how much."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from served_control import ScriptedDaemon, served, serving

from lazyimg.control import ControlClient, serve_control
from lazyimg.control import client as control_client
from lazyimg.errors import ConfigError, DaemonUnreachable, InUse


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


def put(path: Path, text: str) -> None:
    path.write_text(text)


def text_of(path: Path) -> str:
    return path.read_text()


async def test_socket_has_its_mode_and_goes_at_the_end(path: Path) -> None:
    """The mode is the one asked for, nothing else is in the folder, and the socket goes with the server."""
    async with serving(ScriptedDaemon(), path, 0o640):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
        assert os.listdir(path.parent) == [path.name]
    assert os.listdir(path.parent) == []


async def test_second_daemon_is_refused(path: Path) -> None:
    """A socket a daemon answers on stays its own."""
    async with serving(ScriptedDaemon(), path):
        with pytest.raises(InUse, match="a daemon answers"):
            await serve_control(ScriptedDaemon(), path, mode=0o600, group=None)
        status = await trio.to_thread.run_sync(ControlClient(path).status)
        assert status["daemon_pid"] == 7
        assert os.listdir(path.parent) == [path.name]


async def test_stale_socket_is_replaced(path: Path) -> None:
    """A socket whose daemon was killed does not stop the next one."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert await served(ScriptedDaemon(), path, ControlClient.status)


async def test_other_things_are_not_replaced(path: Path) -> None:
    """A file at the socket's path is somebody's."""
    put(path, "mine")
    with pytest.raises(InUse, match="something else"):
        await serve_control(ScriptedDaemon(), path, mode=0o600, group=None)
    assert text_of(path) == "mine"


async def test_anothers_socket_is_not_unlinked(path: Path) -> None:
    """What was put in our socket's place is not ours to remove."""
    async with serving(ScriptedDaemon(), path):
        os.unlink(path)
        put(path, "theirs")
    assert text_of(path) == "theirs"


@pytest.mark.parametrize(
    ("make_path", "group", "reason"),
    [
        (lambda folder: folder / ("x" * 120), None, "path too long"),
        (lambda folder: folder / "file" / "sock", None, "File exists"),
        (lambda folder: folder / "sock", "no-such-group", "no group 'no-such-group'"),
    ],
)
async def test_socket_that_cannot_be_is_a_config_error(
    make_path: Callable[[Path], Path], group: str | None, reason: str, tmp_path: Path
) -> None:
    """The message names the key or the path, and the reason; nothing is left behind."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=reason):
        await serve_control(ScriptedDaemon(), make_path(tmp_path), mode=0o600, group=group)
    assert os.listdir(tmp_path) == ["file"]


async def test_listening_socket_is_not_inherited(path: Path) -> None:
    """A child the daemon starts must not answer for it after its death."""
    async with serving(ScriptedDaemon(), path):
        inheritable = []
        for entry in os.listdir("/proc/self/fd"):
            try:
                if os.get_inheritable(int(entry)) and os.readlink(f"/proc/self/fd/{entry}").startswith(
                    "socket:"
                ):
                    inheritable.append(entry)
            except OSError:
                continue  # the descriptor that listed the folder
        assert inheritable == []


async def test_symlink_is_not_followed(path: Path) -> None:
    """A symlink at the socket's path, wherever it leads, is somebody's and stays."""
    os.symlink("elsewhere", path)
    with pytest.raises(InUse, match="something else"):
        await serve_control(ScriptedDaemon(), path, mode=0o600, group=None)
    assert os.readlink(path) == "elsewhere"


async def test_folder_where_others_may_write_is_refused(path: Path) -> None:
    """Where others could put a socket of theirs in ours' place none is made; a sticky folder keeps them from it."""
    os.chmod(path.parent, 0o777)
    with pytest.raises(ConfigError, match="others may put a socket"):
        await serve_control(ScriptedDaemon(), path, mode=0o600, group=None)
    assert os.listdir(path.parent) == []
    os.chmod(path.parent, 0o1777)
    assert await served(ScriptedDaemon(), path, ControlClient.status)


class Peer:
    """What the kernel says of who answers."""

    size = 12

    def __init__(self, uid: int) -> None:
        self._uid = uid

    def unpack(self, _data: bytes) -> tuple[int, int, int]:
        return 1, self._uid, 1


async def test_answer_of_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of a user who is neither root, this one, nor the folder's owner is not believed."""
    monkeypatch.setattr(control_client, "_UCRED", Peer(path.parent.stat().st_uid))
    assert await served(ScriptedDaemon(), path, ControlClient.status)
    daemon = ScriptedDaemon()
    monkeypatch.setattr(control_client, "_UCRED", Peer(4711))
    with pytest.raises(DaemonUnreachable, match="user 4711 answers there"):
        await served(daemon, path, ControlClient.status)
    assert daemon.asked == []


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /v1/nothing HTTP/1.1", b"404"),
        (b"GET /v1/../metrics HTTP/1.1", b"404"),
        (b"POST /v1/status HTTP/1.1", b"405"),
        (b"GET /v1/evict?image=x HTTP/1.1", b"405"),
        (b"GET /" + b"x" * (64 << 10) + b" HTTP/1.1", b"431"),
        (b"nonsense", b"400"),
    ],
)
async def test_other_requests_are_refused(path: Path, request_line: bytes, status: bytes) -> None:
    """[I5] What is no path of ours, no method of it, or has no end, is answered with an error and asks nothing."""
    daemon = ScriptedDaemon()
    async with serving(daemon, path), await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(request_line + b"\r\nHost: x\r\n\r\n")
        answer = await stream.receive_some()
    assert answer.split()[1] == status
    assert daemon.asked == []


async def test_body_is_not_taken_in(path: Path) -> None:
    """[I5] A body, which no question has, is not kept: who sends one without end soon sends no more."""
    limit_bytes = 8 << 20
    daemon = ScriptedDaemon()
    daemon.evict = daemon.wait_for_ever  # type: ignore[method-assign]
    async with serving(daemon, path):
        with socket.socket(socket.AF_UNIX) as sender:
            sender.connect(str(path))
            sender.setblocking(False)
            sender.send(b"POST /v1/evict?image=x HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n")
            sent_bytes = 0
            while sent_bytes < 4 * limit_bytes:
                try:
                    sent_bytes += sender.send(b"x" * (64 << 10))
                except BlockingIOError:
                    await trio.testing.wait_all_tasks_blocked(0.02)
                    if not trio.lowlevel.current_statistics().run_sync_soon_queue_size and daemon.asked:
                        try:
                            sent_bytes += sender.send(b"x")
                        except BlockingIOError:
                            break
    assert sent_bytes < limit_bytes
