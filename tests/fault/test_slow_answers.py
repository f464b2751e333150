"""A request that is slow to answer is sent a second time: how often, to whom, and with what bytes.

Expected sequence: some hundred urgent answers are measured; one is slower than nearly all of them; a second request
goes out, to another endpoint if there is one; the first answer counts, the other connection is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
import trio

from lazyimg.core.hedging import BUDGET_MAX, BUDGET_SHARE, SAMPLES_MIN
from lazyimg.demo.faults import FaultPlan, FaultRule
from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.glance.auth import NoAuth
from lazyimg.glance.client import GlanceClient

pytestmark = pytest.mark.slow

DATA = b"".join(number.to_bytes(8, "big") for number in range(50_000))
WARM_UP = SAMPLES_MIN + 20


class Pair:
    """Two Glances with the same image."""

    def __init__(self, folder: Path) -> None:
        self.one = EmbeddedGlance(folder / "one")
        self.two = EmbeddedGlance(folder / "two")
        self.id = self.one.add_image(DATA).id
        self.two.add_image(DATA, id=self.id)
        self.urls: list[str] = []

    def client(self, *urls: str, hedge: bool = True) -> GlanceClient:
        return GlanceClient(
            NoAuth(urls),
            connect_timeout_s=2,
            first_byte_timeout_s=10,
            between_bytes_timeout_s=5,
            connections_max=8,
            hedge=hedge,
        )

    async def read(self, client: GlanceClient, start: int = 1000, *, is_urgent: bool = True) -> float:
        """Read a range, which must be right; return how long it took."""
        began_s = trio.current_time()
        got = bytearray()
        stop = start + 3000
        body = client.open_range(self.id, start, stop, size_bytes=len(DATA), is_urgent=is_urgent)
        async with body as pieces:
            async for piece in pieces:
                got += piece
        assert got == DATA[start:stop]
        return trio.current_time() - began_s

    async def warm_up(self, client: GlanceClient) -> None:
        for number in range(WARM_UP):
            await self.read(client, number * 8)


@pytest.fixture
async def pair(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Pair]:
    made = Pair(tmp_path)
    for glance in (made.one, made.two):
        made.urls.append(await nursery.start(partial(serve, glance)))
    yield made
    nursery.cancel_scope.cancel()


async def test_slow_answer_is_overtaken(pair: Pair) -> None:
    """[I3] One request hangs: the same range is asked again within that flight, and its bytes are the image's."""
    async with aclosing(pair.client(pair.urls[0])) as client:
        await pair.warm_up(client)
        asked = len(pair.one.requests)
        pair.one.faults = FaultPlan(FaultRule("delay", count=1, seconds=8))
        assert await pair.read(client) < 4
        assert len(pair.one.requests) == asked + 2
        assert {entry.range for entry in list(pair.one.requests)[-2:]} == {"bytes=1000-3999"}
        told = client.statistics()
        assert (told.hedges, told.hedges_won) == (1, 1)
        # The loser's connection is closed, and harms nobody.
        for number in range(20):
            await pair.read(client, number * 100)


async def test_second_request_goes_elsewhere(pair: Pair) -> None:
    """With another endpoint it is that one's turn: what makes one slow may make it slow again."""
    async with aclosing(pair.client(*pair.urls)) as client:
        await pair.warm_up(client)
        assert not pair.two.requests
        pair.one.faults = FaultPlan(FaultRule("delay", seconds=8))
        assert await pair.read(client) < 4
        assert len(pair.two.requests) == 1
        assert [one.state for one in client.statistics().endpoints] == ["closed", "closed"]


@pytest.mark.parametrize(("is_urgent", "hedge"), [(False, True), (True, False)])
async def test_what_nobody_waits_for_is_not_asked_twice(pair: Pair, is_urgent: bool, hedge: bool) -> None:
    """Background requests have time, and an operator may want none at all."""
    async with aclosing(pair.client(pair.urls[0], hedge=hedge)) as client:
        await pair.warm_up(client)
        asked = len(pair.one.requests)
        pair.one.faults = FaultPlan(FaultRule("delay", count=1, seconds=1))
        assert await pair.read(client, is_urgent=is_urgent) >= 1
        assert len(pair.one.requests) == asked + 1
        assert client.statistics().hedges == 0


async def test_slow_server_is_not_asked_twice_as_much(pair: Pair) -> None:
    """[I5] When every answer is slow, second requests stay within their budget."""
    async with aclosing(pair.client(pair.urls[0])) as client:
        await pair.warm_up(client)
        pair.one.faults = FaultPlan(FaultRule("delay", seconds=0.3))
        async with trio.open_nursery() as nursery:
            for number in range(8):
                for _ in range(5):
                    nursery.start_soon(pair.read, client, number * 1000)
        assert client.statistics().hedges <= BUDGET_MAX + 40 * BUDGET_SHARE


async def test_failed_second_request_changes_nothing(pair: Pair) -> None:
    """It fails, and the first one's answer is what counts."""
    async with aclosing(pair.client(*pair.urls)) as client:
        await pair.warm_up(client)
        pair.one.faults = FaultPlan(FaultRule("delay", count=1, seconds=1))
        pair.two.faults = FaultPlan(FaultRule("status", status=500))
        assert await pair.read(client) >= 1
        told = client.statistics()
        assert (told.hedges, told.hedges_won) == (1, 0)
