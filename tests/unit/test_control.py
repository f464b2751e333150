"""The control socket, both ends: a real server on a real Unix socket, a Daemon that is a script."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from outcome import capture

from lazyimg import errors
from lazyimg.control import ControlClient, ImageFacts, Progress, serve_control
from lazyimg.control import client as control_client
from lazyimg.control.server import _ProgressAnswer
from lazyimg.errors import ConfigError, DaemonUnreachable, ImageNotFound, InUse, LazyImgError

# What a Unix socket must hold for a client that reads nothing.
LINES_A_WEEK_MAX = 250

FACTS = ImageFacts(
    id="11111111-2222-3333-4444-555555555555",
    name="debian 12/ü",
    base_name="0" * 40,
    disk_format="qcow2",
    container_format="bare",
    size_bytes=123,
    presented_size_bytes=123,
    presented_format="qcow2",
    view="stored",
    mountpoint="/mnt/_base",
    min_disk_gib=2,
    properties={"kernel_id": "k"},
)


class ScriptedDaemon:
    """Answers what the test says; `fails` is raised by every question."""

    def __init__(self, fails: Exception | None = None, steps: tuple[Progress, ...] = ()) -> None:
        self.fails = fails
        self.steps = steps
        self.asked: list[str] = []
        self.work_began = trio.Event()
        self.work_stopped = trio.Event()

    def _answer(self, image: str) -> None:
        self.asked.append(image)
        if self.fails:
            raise self.fails

    def status(self) -> dict[str, object]:
        self._answer("")
        return {"daemon_pid": 7, "images": []}

    async def image_facts(self, image: str) -> ImageFacts:
        self._answer(image)
        return FACTS

    async def evict(self, image: str) -> int:
        self._answer(image)
        return 4096

    async def restart(self) -> int:
        self._answer("")
        return 7

    async def give_up_mount(self) -> int:
        self._answer("")
        return 7

    async def wait_for_ever(self, image: str) -> int:
        self.asked.append(image)
        await trio.sleep_forever()
        raise AssertionError

    async def prefetch(self, image: str) -> AsyncIterator[Progress]:
        for step in self.steps:
            yield step
        self._answer(image)

    async def verify(self, image: str) -> AsyncIterator[Progress]:
        """Yield once and go on for ever: what stops it is the client."""
        yield Progress(1, 2)
        self.work_began.set()
        try:
            await trio.sleep_forever()
        finally:
            self.work_stopped.set()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@asynccontextmanager
async def serving(daemon: ScriptedDaemon, path: Path, mode: int = 0o600) -> AsyncIterator[trio.CancelScope]:
    """A server that answers inside the block and has ended after it; its scope ends it earlier."""
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, daemon, path, mode=mode, group=None))
        try:
            yield nursery.cancel_scope
        finally:
            nursery.cancel_scope.cancel()


def put(path: Path, text: str) -> None:
    path.write_text(text)


def text_of(path: Path) -> str:
    return path.read_text()


async def served(daemon: ScriptedDaemon, path: Path, ask: Callable[[ControlClient], Any]) -> Any:
    """Return what a client in another thread gets from a server that ends afterwards."""
    async with serving(daemon, path):
        # Raised inside the nursery it would arrive wrapped in a group.
        outcome = await trio.to_thread.run_sync(capture, ask, ControlClient(path))
    return outcome.unwrap()


async def test_every_question_gets_the_daemons_answer(path: Path) -> None:
    """Status, facts and evict arrive as the daemon gave them, the image's name whatever it contains."""
    daemon = ScriptedDaemon()
    name = "debian 12/ü?&image=x#"

    def ask(client: ControlClient) -> tuple[object, ...]:
        return client.status(), client.image_facts(name), client.evict(name)

    assert await served(daemon, path, ask) == ({"daemon_pid": 7, "images": []}, FACTS, 4096)
    assert daemon.asked == ["", name, name]


async def test_progress_ends_with_the_last_step(path: Path) -> None:
    """However many steps are left out between, the first and the last arrive."""
    steps = tuple(Progress(done, 1000, damaged_chunks=done) for done in range(1000))
    daemon = ScriptedDaemon(steps=(*steps, Progress(1000, 1000, 3, "mismatch")))
    seen = await served(daemon, path, lambda client: list(client.prefetch("i")))
    assert seen[0] == steps[0]
    assert seen[-1] == Progress(1000, 1000, 3, "mismatch")
    assert len(seen) < 100


async def test_client_that_never_reads_does_not_block_the_end(path: Path) -> None:
    """[I5] A stopped client's socket takes all lines a week of work sends: the server can always end."""
    line = json.dumps(asdict(Progress(1 << 40, 1 << 40, 1 << 20, "mismatch"))).encode() + b"\n"
    sender, stopped = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with sender, stopped:
        sender.setblocking(False)
        for _ in range(LINES_A_WEEK_MAX):
            sender.send(b"%x\r\n%s\r\n" % (len(line), line))


async def test_week_of_work_has_few_lines(autojump_clock: trio.abc.Clock) -> None:
    """Progress comes five times a second at first and ever more seldom, the last step in any case."""
    week_s = 7 * 86400

    async def work() -> AsyncIterator[Progress]:
        while (now_s := trio.current_time() - began_s) < week_s:
            yield Progress(int(now_s), week_s)
            # Always oftener than a line is due.
            await trio.sleep(max(0.1, now_s / 50))

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.extend(message.get("body", b"").splitlines())

    began_s = trio.current_time()
    await _ProgressAnswer(work)(None, trio.sleep_forever, send)
    assert 100 < len(sent) <= LINES_A_WEEK_MAX
    assert json.loads(sent[-1])["done_bytes"] > week_s * 0.97


async def test_work_without_steps_is_done(path: Path) -> None:
    """A prefetch that yields nothing ends without an error."""
    assert await served(ScriptedDaemon(), path, lambda client: list(client.prefetch("i"))) == []


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.LazyImgError)
    ],
)
async def test_errors_arrive_as_the_class_they_were(name: str, path: Path) -> None:
    """Every class of lazyimg.errors is raised again with its message; one that wants more, as its base."""
    kind = getattr(errors, name)
    if kind in (errors.ChunkAbsent, errors.ChunkUnreadable, errors.ChunkDamaged):
        error, kind = kind("image x: gone; do y", [1]), LazyImgError
    else:
        error = kind("image x: gone; do y")
    with pytest.raises(LazyImgError) as caught:
        await served(ScriptedDaemon(fails=error), path, lambda client: client.image_facts("x"))
    assert type(caught.value) is kind
    assert str(caught.value) == "image x: gone; do y"


async def test_error_after_steps_is_raised(path: Path) -> None:
    """An error in the middle of a stream comes after the steps before it."""
    daemon = ScriptedDaemon(fails=ImageNotFound("image x: gone"), steps=(Progress(1, 2),))
    seen: list[Progress] = []

    def ask(client: ControlClient) -> None:
        seen.extend(client.prefetch("x"))

    with pytest.raises(ImageNotFound, match="image x: gone"):
        await served(daemon, path, ask)
    assert seen == [Progress(1, 2)]


async def test_inner_error_shows_only_its_class(
    path: Path, caplog: pytest.LogCaptureFixture, expected_warnings: Callable[..., None]
) -> None:
    """A bug in the daemon is an error line for the client, a traceback in the log, and no end of serving."""
    expected_warnings("ERROR lazyimg.control.messages: control request failed")
    daemon = ScriptedDaemon(fails=RuntimeError("token=secret"))

    def ask(client: ControlClient) -> str:
        with pytest.raises(LazyImgError, match="RuntimeError") as caught:
            client.evict("x")
        daemon.fails = None
        assert client.evict("x") == 4096
        return str(caught.value)

    assert "secret" not in await served(daemon, path, ask)
    assert "Traceback" in caplog.text


async def test_work_stops_when_the_client_goes_away(path: Path) -> None:
    """A client that closes the stream ends the daemon's generator, whose clean-up runs."""
    daemon = ScriptedDaemon()

    def ask(client: ControlClient) -> None:
        steps = client.verify("x")
        assert next(steps) == Progress(1, 2)
        trio.from_thread.run(daemon.work_began.wait)
        steps.close()

    with trio.fail_after(10):
        async with serving(daemon, path):
            await trio.to_thread.run_sync(ask, ControlClient(path))
            await daemon.work_stopped.wait()


async def test_daemon_that_ends_is_no_success(path: Path) -> None:
    """A stream cut by the daemon's end is an error, not the end of the work."""
    daemon = ScriptedDaemon()
    async with serving(daemon, path) as server:

        def ask() -> None:
            steps = ControlClient(path).verify("x")
            next(steps)
            trio.from_thread.run_sync(server.cancel)
            with pytest.raises(DaemonUnreachable, match="went away"):
                next(steps)

        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(ask)


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


async def test_errors_have_their_http_status(path: Path) -> None:
    """Other clients than ours see a fitting status and the error as JSON, before and in a stream."""
    import httpx

    daemon = ScriptedDaemon(fails=ImageNotFound("image x: gone"))
    async with serving(daemon, path):
        transport = httpx.AsyncHTTPTransport(uds=str(path), verify=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for method, url, status in (
                ("GET", "/v1/image?image=x", 404),
                ("POST", "/v1/prefetch?image=x", 404),
                ("GET", "/v1/image", 400),
                ("POST", "/v1/evict?image=", 400),
            ):
                answer = await client.request(method, url)
                assert answer.status_code == status, url
                assert set(json.loads(answer.content)) == {"error", "message"}


async def test_metrics_are_the_status_in_numbers(path: Path) -> None:
    """`/metrics` has what Prometheus reads, made of the daemon's status."""
    page = await served(ScriptedDaemon(), path, lambda client: client.metrics())
    assert "lazyimg_open_images 0.0\n" in page


async def test_metrics_of_a_failing_daemon_are_an_error(path: Path) -> None:
    """A status that cannot be had is raised to whoever asks for the metrics."""
    with pytest.raises(InUse, match="x: y"):
        await served(ScriptedDaemon(fails=InUse("x: y")), path, lambda client: client.metrics())


# ── who may ask, and how much ──


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


async def test_failing_disk_is_told_and_no_fault_of_ours(path: Path) -> None:
    """What the cache disk refuses arrives as one line that says so, without a traceback in the log."""
    error = OSError(errno.EIO, "cache disk /c: bypassed")
    with pytest.raises(LazyImgError, match="cache disk /c: bypassed; `lazyimg status"):
        await served(ScriptedDaemon(fails=error), path, lambda client: client.evict("x"))
