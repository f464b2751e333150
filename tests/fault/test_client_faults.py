"""Every way a Glance, or what stands before it, can fail: what the client makes of it.

Expected of each: a typed error; never a byte too many or out of place; and the same client works right after.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

import lazyimg.glance.client as client_module
from lazyimg.core.identity import ImageRecord
from lazyimg.demo.faults import Action, FaultPlan, FaultRule
from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.errors import GlanceUnavailable, ImageForbidden, ImageNotFound, WholeBody
from lazyimg.glance.auth import Access, NoAuth
from lazyimg.glance.client import GlanceClient
from lazyimg.glance.endpoints import HANGING_AFTER_S

DATA = b"".join(number.to_bytes(8, "big") for number in range(100_000))
SIZE = len(DATA)


def make_client(*urls: str, connections_max: int = 4, first_byte_timeout_s: float = 2) -> GlanceClient:
    """Return an impatient client; less patience would take a busy machine for a silent server."""
    return GlanceClient(
        NoAuth(urls),
        connect_timeout_s=1,
        first_byte_timeout_s=first_byte_timeout_s,
        between_bytes_timeout_s=1,
        connections_max=connections_max,
    )


class Here:
    """An embedded Glance with one image, and a client of it."""

    def __init__(self, glance: EmbeddedGlance, url: str, record: ImageRecord, client: GlanceClient) -> None:
        self.glance, self.url, self.record, self.client = glance, url, record, client

    async def read(self, start: int, stop: int, client: GlanceClient | None = None) -> bytes:
        """Read a range whole."""
        into = bytearray()
        await self.read_into(into, start, stop, client)
        return bytes(into)

    async def read_into(
        self, into: bytearray, start: int, stop: int, client: GlanceClient | None = None
    ) -> None:
        """Read a range; what came stays in `into` when it fails."""
        body = (client or self.client).open_range(self.record.id, start, stop, size_bytes=SIZE)
        async with body as pieces:
            async for piece in pieces:
                into += piece


@pytest.fixture
async def here(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Here]:
    """A Glance, its image and a client."""
    glance = EmbeddedGlance(tmp_path)
    record = glance.add_image(DATA)
    url = await nursery.start(partial(serve, glance))
    async with aclosing(make_client(url)) as client:
        yield Here(glance, url, record, client)


# action, further fields, what is raised, how many bytes may have come
FAULTS: list[tuple[Action, dict[str, object], type[Exception], int]] = [
    ("status", {"status": 500}, GlanceUnavailable, 0),
    ("status", {"status": 503}, GlanceUnavailable, 0),
    ("status", {"status": 429}, GlanceUnavailable, 0),
    ("status", {"status": 416}, GlanceUnavailable, 0),
    ("status", {"status": 400}, GlanceUnavailable, 0),
    ("status", {"status": 401}, GlanceUnavailable, 0),
    ("status", {"status": 403}, ImageForbidden, 0),
    ("status", {"status": 404}, ImageNotFound, 0),
    ("empty_204", {}, GlanceUnavailable, 0),
    ("reset", {}, GlanceUnavailable, 0),
    ("redirect", {"location": "http://127.0.0.1:9/"}, GlanceUnavailable, 0),
    ("whole_body", {"status": 200}, WholeBody, 0),
    ("whole_body", {"status": 206}, WholeBody, 0),
    ("wrong_content_range", {}, GlanceUnavailable, 0),
    ("short_body", {"bytes": 0}, GlanceUnavailable, 0),
    ("short_body", {"bytes": 70_001}, GlanceUnavailable, 70_001),
    ("short_body", {"bytes": 299_999}, GlanceUnavailable, 299_999),
    ("stall", {"bytes": 0}, GlanceUnavailable, 0),
    ("stall", {"bytes": 70_001}, GlanceUnavailable, 70_001),
    ("delay", {"seconds": None}, GlanceUnavailable, 0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("action", "fields", "kind", "came"), FAULTS)
async def test_fault_is_typed_and_passes(
    here: Here, action: Action, fields: dict[str, object], kind: type[Exception], came: int
) -> None:
    """The error says what can be done, the bytes that came are right, and the next read is well."""
    here.glance.faults = FaultPlan(FaultRule(action, count=1, **fields))  # type: ignore[arg-type]
    into = bytearray()
    with pytest.raises(kind) as caught:
        await here.read_into(into, 1000, 301_000)
    assert type(caught.value) is kind
    assert len(into) == came
    assert into == DATA[1000 : 1000 + came]
    assert await here.read(1000, 301_000) == DATA[1000:301_000]


@pytest.mark.slow
@pytest.mark.parametrize("action", ["short_body", "stall"])
async def test_broken_stream_ends_in_an_error(here: Here, action: Action) -> None:
    """A stream that breaks off is told from one that ended."""
    here.glance.faults = FaultPlan(FaultRule(action, bytes=123_456))
    into = bytearray()
    with pytest.raises(GlanceUnavailable):
        await _read_stream(here, into)
    assert into == DATA[:123_456]


async def _read_stream(here: Here, into: bytearray) -> None:
    async with here.client.open_stream(here.record.id, size_bytes=SIZE) as pieces:
        async for piece in pieces:
            into += piece


async def test_retry_after_is_handed_on(here: Here) -> None:
    """Who retries has to know how long the server asked for."""
    here.glance.faults = FaultPlan(FaultRule("status", headers={"Retry-After": "7"}))
    with pytest.raises(GlanceUnavailable) as caught:
        await here.read(0, 10)
    assert caught.value.retry_after_s == 7


@pytest.mark.parametrize("action", ["status", "reset", "empty_204", "redirect"])
async def test_faults_of_record_and_list(here: Here, action: Action) -> None:
    """Records and lists fail as passing faults too."""
    here.glance.faults = FaultPlan(FaultRule(action, kind="any", location="http://127.0.0.1:9/"))
    with pytest.raises(GlanceUnavailable):
        await here.client.image(here.record.id)
    with pytest.raises(GlanceUnavailable):
        await here.client.list_images()
    here.glance.faults = FaultPlan()
    assert await here.client.image(here.record.id) == here.record
    assert await here.client.list_images() == [here.record]


async def test_no_glance_at_all(here: Here) -> None:
    """Nobody listens: told with the endpoint."""
    async with aclosing(make_client("http://127.0.0.1:9")) as client:
        with pytest.raises(GlanceUnavailable, match=r"127\.0\.0\.1:9"):
            await client.image(here.record.id)


@pytest.mark.parametrize("fault", [FaultRule("status", "any"), FaultRule("reset", "any")])
async def test_next_endpoint_is_asked_and_remembered(here: Here, fault: FaultRule) -> None:
    """An endpoint that is down or answers 5xx costs one try, not one per call."""
    broken = EmbeddedGlance(here.glance.folder.parent / "broken", faults=FaultPlan(fault))
    async with trio.open_nursery() as nursery:
        broken_url = await nursery.start(partial(serve, broken))
        async with aclosing(make_client("http://127.0.0.1:9", broken_url, here.url)) as client:
            for _ in range(5):
                assert await here.read(5, 5000, client) == DATA[5:5000]
        assert len(broken.requests) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_endpoint_with_silent_bodies_is_left(here: Here) -> None:
    """A body that stalls fails this call, and the next goes elsewhere."""
    bad = EmbeddedGlance(here.glance.folder.parent / "bad", faults=FaultPlan(FaultRule("stall", bytes=10)))
    bad.add_image(DATA, id=here.record.id)
    async with trio.open_nursery() as nursery:
        bad_url = await nursery.start(partial(serve, bad))
        async with aclosing(make_client(bad_url, here.url)) as client:
            with pytest.raises(GlanceUnavailable):
                await here.read(5, 5000, client)
            assert await here.read(5, 5000, client) == DATA[5:5000]
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_hanging_endpoint_is_left_by_an_impatient_caller(here: Here) -> None:
    """A caller that gives up before our timeout still teaches us that the endpoint hangs."""
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    silent = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
    async with listener, aclosing(make_client(silent, here.url, first_byte_timeout_s=60)) as client:
        with trio.move_on_after(HANGING_AFTER_S + 0.1) as scope:
            await client.image(here.record.id)
        assert scope.cancelled_caught
        assert await client.image(here.record.id) == here.record


@pytest.mark.slow
async def test_image_whose_bytes_hang_keeps_no_other_waiting(
    here: Here, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """[I6] Its requests look like a dead endpoint; a probe that is not one of them finds out that it is not."""
    expected_warnings("no Glance answers")
    hung = here.glance.add_image(DATA)
    here.glance.faults = FaultPlan(FaultRule("delay", image_id=hung.id))
    async with aclosing(make_client(here.url, connections_max=12, first_byte_timeout_s=0.5)) as client:

        async def hang() -> None:
            while True:
                with suppress(GlanceUnavailable):
                    async with client.open_range(hung.id, 0, 10, size_bytes=SIZE):
                        raise AssertionError("its bytes hang")

        for _ in range(6):
            nursery.start_soon(hang)
        slowest_s = 0.0
        for number in range(25):
            began_s = trio.current_time()
            assert await here.read(number, number + 5000, client) == DATA[number : number + 5000]
            slowest_s = max(slowest_s, trio.current_time() - began_s)
            await trio.sleep(0.1)
        assert slowest_s < 1.4, "longer than one of the hung requests"
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_cancelled_reads_leave_the_pool_usable(here: Here) -> None:
    """Cancelled before the answer, within the body and while the reader does something else."""
    here.glance.faults = FaultPlan(
        FaultRule("delay", first=1, count=3), FaultRule("stall", first=4, count=3, bytes=10_000)
    )
    for _ in range(6):
        with trio.move_on_after(0.1) as scope:
            await here.read(0, 500_000)
        assert scope.cancelled_caught
    for _ in range(6):
        with trio.CancelScope() as scope:
            async with here.client.open_range(here.record.id, 0, SIZE, size_bytes=SIZE) as pieces:
                assert await anext(aiter(pieces))
                scope.cancel()
                await trio.sleep_forever()
        assert scope.cancelled_caught
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(_read_right, here, number * 1000)


async def _read_right(here: Here, start: int) -> None:
    assert await here.read(start, start + 5000) == DATA[start : start + 5000]


async def test_reader_that_stops_early_leaves_the_pool_usable(here: Here) -> None:
    """A body left unread costs its connection, nothing else."""
    for _ in range(6):
        async with here.client.open_range(here.record.id, 0, SIZE, size_bytes=SIZE) as pieces:
            async for piece in pieces:
                assert DATA.startswith(piece)
                break
    assert await here.read(0, SIZE) == DATA


Handler = Callable[[trio.SocketStream], Awaitable[None]]
Scripted = Callable[[bytes], Awaitable[GlanceClient]]


@pytest.fixture
async def scripted(nursery: trio.Nursery) -> AsyncIterator[Scripted]:
    """Return `await scripted(reply)`: a client of a server that sends these bytes to every request."""
    clients: list[GlanceClient] = []

    async def start(reply: bytes) -> GlanceClient:
        async def answer(stream: trio.SocketStream) -> None:
            async with stream:
                while await stream.receive_some():
                    await stream.send_all(reply)
                    if b"close" in reply:
                        return

        listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        clients.append(make_client(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"))
        return clients[-1]

    yield start
    for client in clients:
        await client.aclose()


async def _read(client: GlanceClient, into: bytearray, start: int = 4, stop: int = 8) -> None:
    async with client.open_range("x", start, stop, size_bytes=100) as pieces:
        async for piece in pieces:
            into += piece


RANGE = b"HTTP/1.1 206 P\r\nContent-Range: bytes 4-7/100\r\n"


@pytest.mark.parametrize(
    "reply",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 999999 what\r\n\r\n",
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 4-7/100\r\nContent-Length: x\r\n\r\nabcd",
        RANGE + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
        RANGE + b"Content-Length: 4\r\nContent-Encoding: gzip\r\n\r\nabcd",
        RANGE + b"Transfer-Encoding: gzip\r\n\r\nabcd",
        RANGE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabcd\r\n0\r\n\r\n",
        # As long as nobody says how long it is, it may be the whole image from its first byte on.
        RANGE + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n0\r\n\r\n",
        RANGE + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n1\r\ne\r\n0\r\n\r\n",
        RANGE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        RANGE + b"Connection: close\r\n\r\nabcde",
        RANGE + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"HTTP/1.1 206 P\r\nContent-Type: multipart/byteranges; boundary=b\r\nContent-Length: 4\r\n\r\nabcd",
    ],
)
async def test_broken_protocol_gives_no_byte(scripted: Scripted, reply: bytes) -> None:
    """What is not HTTP, not plain, or not provably the range is a passing fault without a byte."""
    client = await scripted(reply)
    into = bytearray()
    with pytest.raises(GlanceUnavailable):
        await _read(client, into)
    assert not into


@pytest.mark.parametrize(
    "reply",
    [
        RANGE + b"Content-Length: 4\r\n\r\nabcd",
        RANGE + b"Content-Length: 4\r\nContent-Encoding: identity\r\n\r\nabcd",
        RANGE + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1\r\nd\r\n0\r\n\r\n",
        RANGE + b"Connection: close\r\n\r\nabcd",
    ],
)
async def test_every_framing_of_the_right_bytes_is_taken(scripted: Scripted, reply: bytes) -> None:
    """Content-Length, chunks, or the end of the connection."""
    into = bytearray()
    await _read(await scripted(reply), into)
    assert into == b"abcd"


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b'{"id": "x"}',
        b'{"id": "y", "status": "active"}',
        b'{"id": "x", "status": "active", "size": "4"}',
        b"[" * 1000,
        b" " * (client_module.RECORD_BYTES_MAX + 1),
    ],
)
async def test_hostile_record_is_a_passing_fault(scripted: Scripted, body: bytes) -> None:
    """Not JSON, another image's, of wrong types, or too long."""
    client = await scripted(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    with pytest.raises(GlanceUnavailable, match="image x"):
        await client.image("x")


ENDLESS = [
    # Bodies, of a record and of a refusal; headers; and interim answers without the one that counts (RFC 9110 §15.2).
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n"),
    (b"HTTP/1.1 418 No\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n"),
    (b"HTTP/1.1 200 OK\r\n", b"X-Flood: " + b"y" * 4000 + b"\r\n"),
    (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("beginning", "again"), ENDLESS)
async def test_answer_without_end_ends(nursery: trio.Nursery, beginning: bytes, again: bytes) -> None:
    """[I5] Whatever a server sends for ever is cut at a limit of bytes or time."""
    sent_bytes = 0

    async def flood(stream: trio.SocketStream) -> None:
        nonlocal sent_bytes
        with suppress(trio.BrokenResourceError):
            async with stream:
                await stream.receive_some()
                await stream.send_all(beginning)
                while True:
                    await stream.send_all(again)
                    sent_bytes += len(again)

    listeners = await nursery.start(partial(trio.serve_tcp, flood, 0, host="127.0.0.1"))
    url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
    async with aclosing(make_client(url, first_byte_timeout_s=1)) as client:
        with trio.fail_after(30), pytest.raises(GlanceUnavailable, match="image x"):
            await client.image("x")
    # What the kernel and httpcore hold is beyond ours; a few MB at most.
    assert sent_bytes < 16 << 20 or not beginning


async def test_next_page_is_asked_where_the_first_was(here: Here, nursery: trio.Nursery) -> None:
    """A `next` that names another host leads to our own endpoint: no token goes elsewhere."""
    other = EmbeddedGlance(here.glance.folder.parent / "other")
    other_url = await nursery.start(partial(serve, other))
    asked: list[bytes] = []

    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            while request := await stream.receive_some():
                asked.append(request.split(b" ")[1])
                following = {} if b"marker" in request else {"next": f"{other_url}/v2/images?marker=m"}
                body = json.dumps({"images": []} | following).encode()
                await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    listeners = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
    async with aclosing(make_client(f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}")) as client:
        assert await client.list_images() == []
    assert asked.count(b"/v2/images?marker=m") >= 1
    assert not other.requests


async def test_list_that_leads_in_a_circle_ends(scripted: Scripted) -> None:
    """A `next` that was followed before is refused."""
    body = b'{"images": [], "next": "/v2/images?marker=m"}'
    client = await scripted(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    with pytest.raises(GlanceUnavailable, match="earlier one"):
        await client.list_images()


async def test_list_without_end_ends(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are followed up to a limit."""
    monkeypatch.setattr(client_module, "LIST_PAGES_MAX", 3)
    monkeypatch.setattr(client_module, "LIST_PAGE_IMAGES", 1)
    for number in range(3):
        here.glance.add_image(bytes([number]))
    with pytest.raises(GlanceUnavailable, match="more than 3 pages"):
        await here.client.list_images()


async def test_list_of_more_bytes_than_a_limit_ends(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5] Pages that are each small enough are not so together."""
    monkeypatch.setattr(client_module, "LIST_BYTES_MAX", 2000)
    monkeypatch.setattr(client_module, "LIST_PAGE_IMAGES", 1)
    for number in range(3):
        here.glance.add_image(bytes([number]))
    with pytest.raises(GlanceUnavailable, match="longer than"):
        await here.client.list_images()


class TwoTokens:
    """Gives a token that Glance refuses, and another when it is renewed."""

    def __init__(self, url: str) -> None:
        self.url, self.token, self.renewals = url, "old", 0

    async def access(self) -> Access:
        """Return the token of now."""
        return Access((self.url,), {"X-Auth-Token": self.token})

    async def renew(self, refused: Access) -> Access:
        """Return the good one."""
        self.token, self.renewals = "fresh", self.renewals + 1
        return await self.access()


async def test_refused_token_is_renewed_once_within_the_call(here: Here) -> None:
    """After a 401 one renewal and one more try; a second 401 is a passing fault."""
    here.glance.token = "fresh"
    auth = TwoTokens(here.url)
    client = GlanceClient(
        auth, connect_timeout_s=5, first_byte_timeout_s=5, between_bytes_timeout_s=5, connections_max=2
    )
    async with aclosing(client):
        assert await here.read(0, 100, client) == DATA[:100]
        assert auth.renewals == 1
        here.glance.token = "another"
        with pytest.raises(GlanceUnavailable, match="401"):
            await here.read(0, 100, client)
        assert auth.renewals == 2


async def test_token_goes_to_no_other_host(here: Here) -> None:
    """Neither a redirect nor a page's link takes it elsewhere."""
    other = EmbeddedGlance(here.glance.folder.parent / "other")
    async with trio.open_nursery() as nursery:
        other_url = await nursery.start(partial(serve, other))
        here.glance.faults = FaultPlan(FaultRule("redirect", "any", location=f"{other_url}/v2/images"))
        with pytest.raises(GlanceUnavailable, match="redirects"):
            await here.client.list_images()
        assert not other.requests
        nursery.cancel_scope.cancel()
