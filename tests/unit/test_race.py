"""Two requests for the same bytes: one reply comes out, the other is closed, whatever happens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from lazyimg.errors import GlanceUnavailable
from lazyimg.glance.race import race


class Reply:
    """Notes that it was closed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_closed = False

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self.is_closed = True


class Server:
    """Answers, or fails, after so many seconds; who is asked first is "a", then "b"."""

    def __init__(self, **after_s: float) -> None:
        self.after_s = after_s
        self.failing: set[str] = set()
        self.replies: list[Reply] = []
        self.ended: list[str] = []

    async def attempt(self, name: str) -> Reply:
        try:
            await trio.sleep(self.after_s[name])
        finally:
            self.ended.append(name)
        if name in self.failing:
            raise GlanceUnavailable(f"{name} failed")
        self.replies.append(Reply(name))
        return self.replies[-1]

    async def race(self, delay_s: float = 1, second: Callable[[], str | None] = lambda: "b") -> str:
        """Return who won; all other replies must be closed, and all attempts ended."""
        asked, reply, is_second = await race(self.attempt, "a", delay_s, second)
        assert asked == reply.name
        assert is_second == (asked == "b")
        assert [one.name for one in self.replies if not one.is_closed] == [asked]
        return asked


def never() -> str | None:
    raise AssertionError("nobody else is asked")


async def test_quick_answer_needs_no_second(autojump_clock: MockClock) -> None:
    """Within the delay, or where the delay has no end, one is asked."""
    assert await Server(a=0.9).race(second=never) == "a"
    assert await Server(a=9).race(math.inf, second=never) == "a"


async def test_second_is_asked_after_the_delay_and_the_loser_ended(autojump_clock: MockClock) -> None:
    """The first that answers wins; the other is cancelled where it is."""
    server = Server(a=9, b=0.5)
    assert await server.race() == "b"
    assert trio.current_time() == pytest.approx(1.5)
    assert sorted(server.ended) == ["a", "b"]
    assert await Server(a=1.2, b=9).race() == "a"


async def test_nobody_else_to_ask(autojump_clock: MockClock) -> None:
    """Without budget the first is waited for."""
    assert await Server(a=9).race(second=lambda: None) == "a"


async def test_failure_before_the_delay_is_told_at_once(autojump_clock: MockClock) -> None:
    """A second request is for the slow, not for the broken."""
    server = Server(a=0.5)
    server.failing = {"a"}
    with pytest.raises(GlanceUnavailable, match="a failed"):
        await server.race(second=never)
    assert trio.current_time() == pytest.approx(0.5)


@pytest.mark.parametrize(("failing", "winner"), [("a", "b"), ("b", "a")])
async def test_of_two_one_may_fail(autojump_clock: MockClock, failing: str, winner: str) -> None:
    """The failure of one leaves the other's answer."""
    server = Server(a=2, b=2)
    server.failing = {failing}
    assert await server.race() == winner


async def test_both_fail(autojump_clock: MockClock) -> None:
    """Then that is told, once both have."""
    server = Server(a=2, b=3)
    server.failing = {"a", "b"}
    with pytest.raises(GlanceUnavailable, match="b failed"):
        await server.race()
    assert trio.current_time() == pytest.approx(4)


async def test_two_answers_at_one_moment(autojump_clock: MockClock) -> None:
    """One is taken, the other closed; in many tries, since chance orders them."""
    for _ in range(20):
        assert await Server(a=2, b=1).race() in "ab"


async def test_cancelled_race_closes_what_came(autojump_clock: MockClock) -> None:
    """Who asked went away at the very moment of the answer, or while both were out."""
    for cancelled_at_s in (0.5, 1.5, 2.0, 2.5):
        for _ in range(5):
            server = Server(a=2, b=2)
            with trio.move_on_after(cancelled_at_s) as scope:
                await server.race()
            assert sorted(server.ended) == (["a"] if cancelled_at_s < 1 else ["a", "b"])
            assert all(reply.is_closed for reply in server.replies) or not scope.cancelled_caught
