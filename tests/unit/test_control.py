"""What is asked and answered over the control socket, both ends: a real server, a Daemon that is a script."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import trio
from served_control import FACTS, ScriptedDaemon, served, serving

from lazyimg import errors
from lazyimg.control import ControlClient, Progress
from lazyimg.control.server import _ProgressAnswer
from lazyimg.errors import DaemonUnreachable, ImageNotFound, InUse, LazyImgError

# What a Unix socket must hold for a client that reads nothing.
LINES_A_WEEK_MAX = 250


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


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


async def test_failing_disk_is_told_and_no_fault_of_ours(path: Path) -> None:
    """What the cache disk refuses arrives as one line that says so, without a traceback in the log."""
    error = OSError(errno.EIO, "cache disk /c: bypassed")
    with pytest.raises(LazyImgError, match="cache disk /c: bypassed; `lazyimg status"):
        await served(ScriptedDaemon(fails=error), path, lambda client: client.evict("x"))


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
