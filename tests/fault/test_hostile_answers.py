"""What a server sends that is no Glance, or one that means harm: no byte of it counts, and it ends.

Expected of each: a typed error, a limit of bytes, pages or time, and no request to a host that is not ours.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from functools import partial

import pytest
import trio
from client_rig import Here, make_client

import lazyimg.glance.client as client_module
from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.errors import GlanceUnavailable
from lazyimg.glance.client import GlanceClient

Handler = Callable[[trio.SocketStream], Awaitable[None]]
Scripted = Callable[[bytes], Awaitable[GlanceClient]]


async def listen(nursery: trio.Nursery, handler: Handler) -> str:
    """Have connections handled until the nursery ends; return the URL they come by."""
    listeners = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
    return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"


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

        clients.append(make_client(await listen(nursery, answer)))
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

    async with aclosing(make_client(await listen(nursery, flood), first_byte_timeout_s=1)) as client:
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

    async with aclosing(make_client(await listen(nursery, answer))) as client:
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
