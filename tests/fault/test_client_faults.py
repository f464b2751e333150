"""Every way a Glance, or what stands before it, can fail: what the client makes of it.

Expected of each: a typed error; never a byte too many or out of place; and the same client works right after.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing, suppress
from functools import partial

import pytest
import trio
from client_rig import DATA, SIZE_BYTES, Here, make_client

from lazyimg.demo.faults import Action, FaultPlan, FaultRule
from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.errors import GlanceUnavailable, ImageForbidden, ImageNotFound, WholeBody
from lazyimg.glance.auth import Access
from lazyimg.glance.client import GlanceClient
from lazyimg.glance.endpoints import HANGING_AFTER_S

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
    async with here.client.open_stream(here.record.id, size_bytes=SIZE_BYTES) as pieces:
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
                    async with client.open_range(hung.id, 0, 10, size_bytes=SIZE_BYTES):
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
            async with here.client.open_range(here.record.id, 0, SIZE_BYTES, size_bytes=SIZE_BYTES) as pieces:
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
        async with here.client.open_range(here.record.id, 0, SIZE_BYTES, size_bytes=SIZE_BYTES) as pieces:
            async for piece in pieces:
                assert DATA.startswith(piece)
                break
    assert await here.read(0, SIZE_BYTES) == DATA


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
