"""Which endpoint is asked, and who waits for whom while none answers; no socket, the clock jumps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.errors import GlanceUnavailable
from lazyimg.glance.endpoints import AVOIDED_S, HANGING_AFTER_S, WAIT_MAX_S, Ask, Endpoints

ONE = ("http://one",)
BOTH = ("http://one", "http://two")


class Servers:
    """Endpoints and the servers behind them: those in `away` do not answer, after `silence_s`."""

    def __init__(self, urls: Sequence[str] = ONE) -> None:
        self.urls = urls
        self.endpoints = Endpoints(pause_max_s=5)
        self.away: set[str] = set()
        self.silence_s = 0.0
        self.asked: list[str] = []
        self.answered_at: list[float] = []

    async def ask(self, *, may_wait: bool = True) -> None:
        """Ask as the client does: one endpoint after another."""
        asks = await self.endpoints.wait_usable(self.urls, "image x", may_wait=may_wait)
        for ask in asks:
            try:
                await self.attempt(ask)
            except GlanceUnavailable:
                if ask == asks[-1]:
                    raise
            else:
                self.answered_at.append(trio.current_time())
                return

    async def ask_until_answered(self) -> None:
        """Ask as a fetcher does."""
        while True:
            try:
                return await self.ask()
            except GlanceUnavailable:
                await trio.sleep(0.1)

    async def attempt(self, ask: Ask) -> None:
        with self.endpoints.attempt(ask, "image x"):
            self.asked.append(ask.endpoint)
            if ask.endpoint in self.away:
                await trio.sleep(self.silence_s)
                raise GlanceUnavailable(f"image x: {ask.endpoint}: no answer")

    async def fail(self, count: int) -> None:
        for _ in range(count):
            with pytest.raises(GlanceUnavailable):
                await self.ask()

    @property
    def states(self) -> list[str]:
        return [one.state for one in self.endpoints.statistics()]


@pytest.fixture
def _outage(expected_warnings: Callable[..., None]) -> None:
    expected_warnings("no Glance answers")


@pytest.mark.usefixtures("_outage")
async def test_dead_endpoint_costs_one_reader_at_a_time_a_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """[I5] Twenty readers wait for one probe a pause, and all go on at its first answer."""
    servers = Servers()
    servers.away, servers.silence_s = {*ONE}, 20
    await servers.fail(3)
    assert servers.endpoints.is_down
    asked_before = len(servers.asked)
    for _ in range(20):
        nursery.start_soon(servers.ask_until_answered)
    await trio.sleep(50)
    # 20 s of silence and a pause of 0.25 s, 0.5 s, …: two have ended, the third is out.
    assert len(servers.asked) - asked_before == 3
    servers.away.clear()
    await trio.sleep(21)
    assert len(servers.answered_at) == 20
    assert max(servers.answered_at) - min(servers.answered_at) < 1
    assert not servers.endpoints.is_down


@pytest.mark.usefixtures("_outage")
async def test_who_may_not_wait_is_told_at_once_what_is_wrong(autojump_clock: MockClock) -> None:
    """[I6] A lookup learns that Glance is down without asking it."""
    servers = Servers()
    servers.away = {*ONE}
    await servers.fail(3)
    began_at = trio.current_time()
    with pytest.raises(GlanceUnavailable, match="image x: no Glance answers: http://one: no answer"):
        await servers.ask(may_wait=False)
    assert trio.current_time() == began_at
    assert len(servers.asked) == 3


@pytest.mark.usefixtures("_outage")
async def test_wait_for_an_endpoint_has_an_end(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    """[I5] Who waits behind a probe that never ends is told so in the end."""
    servers = Servers()
    servers.away = {*ONE}
    await servers.fail(3)
    servers.silence_s = 1e6
    nursery.start_soon(servers.ask_until_answered)
    await trio.sleep(1)
    began_at = trio.current_time()
    await servers.fail(1)
    assert trio.current_time() - began_at == pytest.approx(WAIT_MAX_S)
    nursery.cancel_scope.cancel()


async def test_single_failures_close_no_door(autojump_clock: MockClock) -> None:
    """Behind uwsgi one connection in twenty is closed unannounced."""
    servers = Servers()
    for _ in range(5):
        servers.away = {*ONE}
        await servers.fail(2)
        servers.away.clear()
        await servers.ask()
    assert servers.states == ["closed"]


async def test_another_endpoint_is_used_meanwhile_and_the_first_again_later(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A dead endpoint costs one try; probes that nobody waits for find out when it is back."""
    servers = Servers(BOTH)
    servers.away = {"http://one"}
    for _ in range(5):
        await servers.ask()
    assert servers.asked == ["http://one", *["http://two"] * 5]
    assert servers.states == ["open", "closed"]
    assert not servers.endpoints.is_down

    async def probe() -> None:
        while True:
            ask = await servers.endpoints.wait_forgotten_probe()
            try:
                await servers.attempt(ask)
            except GlanceUnavailable:
                continue

    nursery.start_soon(probe)
    await trio.sleep(30)
    # Pauses of 0.25, 0.5, 1, 2, 4, 5, 5, 5 s.
    assert 7 <= servers.asked[6:].count("http://one") <= 9
    servers.away.clear()
    await trio.sleep(6)
    assert servers.states == ["closed", "closed"]
    await servers.ask()
    assert servers.asked[-1] == "http://one"
    nursery.cancel_scope.cancel()


@pytest.mark.usefixtures("_outage")
async def test_probe_whose_caller_went_away_is_taken_by_the_next(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A cancelled reader harms nobody: who waited behind its probe is the probe."""
    servers = Servers()
    servers.away = {*ONE}
    await servers.fail(3)
    servers.silence_s = 1e6
    await trio.sleep(1)
    with trio.CancelScope() as first:
        async with trio.open_nursery() as inner:
            inner.start_soon(servers.ask)
            await wait_all_tasks_blocked()
            assert servers.states == ["half-open"]
            nursery.start_soon(servers.ask)
            await wait_all_tasks_blocked()
            servers.away.clear()
            first.cancel()
    await wait_all_tasks_blocked()
    assert len(servers.answered_at) == 1
    assert servers.states == ["closed"]


async def test_endpoint_of_bad_bodies_or_silence_is_asked_last_for_a_while(autojump_clock: MockClock) -> None:
    """A caller that gave up after a while and a broken body say that another may do better."""
    servers = Servers(BOTH)
    servers.away, servers.silence_s = {"http://one"}, 1e6
    with trio.move_on_after(HANGING_AFTER_S + 0.1):
        await servers.ask()
    servers.away.clear()
    await servers.ask()
    assert servers.asked == ["http://one", "http://two"]
    await trio.sleep(AVOIDED_S)
    await servers.ask()
    servers.endpoints.avoid("http://one")
    await servers.ask()
    assert servers.asked[2:] == ["http://one", "http://two"]
    assert servers.states == ["closed", "closed"]


async def test_another_login_may_name_other_endpoints(autojump_clock: MockClock) -> None:
    """What is known of an endpoint is kept while it is one of ours, and no longer."""
    servers = Servers(BOTH)
    servers.away = {"http://one"}
    await servers.ask()
    servers.urls = ("http://one", "http://three")
    await servers.ask()
    assert servers.states == ["open", "closed"]
    assert servers.asked[-1] == "http://three"
    late = (await servers.endpoints.wait_usable(servers.urls, "image x", may_wait=False))[0]
    servers.urls = ("http://four",)
    await servers.ask()
    # Sent before the other login, answered after it.
    await servers.attempt(late)
    assert servers.states == ["closed"]
