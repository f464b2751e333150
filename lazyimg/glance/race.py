"""Two requests for the same bytes: the second when the first is slow, and the first answer counts.

Knows no HTTP: what is raced is a call that returns a reply to be closed.  Whatever happens, of two replies one is
closed here, and no request outlives the race.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

import trio

from lazyimg.errors import GlanceUnavailable

# Closing sends a last word over TLS; nobody waits long for it to be taken.
CLOSE_TIMEOUT_S = 1.0


class Closable(Protocol):
    """A reply."""

    async def aclose(self) -> None: ...


_A = TypeVar("_A")
_R = TypeVar("_R", bound=Closable)


async def race(
    attempt: Callable[[_A], Awaitable[_R]], first: _A, delay_s: float, second: Callable[[], _A | None]
) -> tuple[_A, _R, bool]:
    """Return who answered first, its reply, and whether it was the second.

    second: called if the first has not answered after `delay_s`; says whom to ask too, None for nobody.  Raises the
    last GlanceUnavailable when all that were asked have failed.
    """
    replies: list[tuple[_A, _R, bool]] = []
    errors: list[GlanceUnavailable] = []
    out = 1

    async def run(asked: _A, *, is_second: bool) -> None:
        nonlocal out
        try:
            replies.append((asked, await attempt(asked), is_second))
        except GlanceUnavailable as exc:
            errors.append(exc)
        out -= 1
        if replies or not out:
            nursery.cancel_scope.cancel()

    async def run_second() -> None:
        nonlocal out
        await trio.sleep(delay_s)
        other = second()
        if other is not None:
            out += 1
            await run(other, is_second=True)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_second)
            # Here and not in a task of its own: nearly always this is all there is to do.
            await run(first, is_second=False)
        if not replies:
            raise errors[-1]
        return replies.pop(0)
    finally:
        # The loser's, if it came at the same moment; all of them, if who asked was cancelled.
        for _, reply, _ in replies:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await reply.aclose()
