"""Pauses between attempts that a recovery ends; how long they are is tested with the fetcher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from lazyimg.errors import GlanceUnavailable
from lazyimg.image.backoff import Backoff


@pytest.mark.parametrize(("retry_after_s", "pause_s"), [(None, 1), (9, 5)])
async def test_recovery_ends_a_pause_unless_the_server_asked_for_it(
    nursery: trio.Nursery,
    autojump_clock: MockClock,
    expected_warnings: Callable[..., None],
    retry_after_s: float | None,
    pause_s: float,
) -> None:
    """All readers go on when Glance is back; what a server that is there asks for is done all the same."""
    expected_warnings("trying again in")
    recovered = trio.Event()
    backoff = Backoff("x", 5, recovered.wait)
    for _ in range(8):
        await backoff.pause(GlanceUnavailable("down"))
    began_at = trio.current_time()

    async def recover() -> None:
        await trio.sleep(1)
        recovered.set()

    nursery.start_soon(recover)
    await backoff.pause(GlanceUnavailable("down", retry_after_s=retry_after_s))
    assert trio.current_time() - began_at == pytest.approx(pause_s)
