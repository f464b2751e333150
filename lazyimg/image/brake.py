"""How fast a stream brings what nobody waits for: as fast as hydration may, and at full speed once somebody waits.

A stream goes to its end, since the next would begin at zero again: at a low `hydrate_rate` that takes hours.  Guards
I4: one that is slowed down gives its flight's slot back, so that it is in no urgent want's way; and I5: of all images
only SLOW_STREAMS_MAX go on without a slot, and for another one of them is ended.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import trio

from lazyimg.core.pace import SLOW_STREAMS_MAX, Pace

# A stream stays at full speed for so long after the last who waited: a booting guest waits for one part of the image
# after another, and would wait longer for the next if the stream had not gone on meanwhile.
EAGER_S = 5.0
# A stream is held for so long while the cache's disk is not normal; then it ends, and a worker of Glance is free.
DISK_PAUSE_MAX_S = 30.0


class Disk(Protocol):
    """What it needs of the cache's disk."""

    @property
    def is_normal(self) -> bool:
        """False while something is wrong with it."""

    async def wait_normal(self) -> None:
        """Wait until nothing is."""


class SlowStreams:
    """The streams of all images that are slowed down, in the order in which they were."""

    def __init__(self, pace: Pace, disk: Disk) -> None:
        """pace: of all that is fetched for nobody; hydration's own."""
        self.pace = pace
        self.disk = disk
        self._brakes: dict[Brake, None] = {}

    def enter(self, brake: Brake) -> bool:
        """Let a stream go on without a slot, ending another if need be; False if all others are needed now."""
        if len(self._brakes) >= SLOW_STREAMS_MAX:
            ended = next((one for one in self._brakes if one.end_nowait()), None)
            if ended is None:
                return False
            self.leave(ended)
        self._brakes[brake] = None
        return True

    def leave(self, brake: Brake) -> None:
        self._brakes.pop(brake, None)


class Brake:
    """The brake of one image, which has at most one stream at a time."""

    def __init__(self, slow_streams: SlowStreams) -> None:
        self._slow_streams = slow_streams
        self._pace, self._disk = slow_streams.pace, slow_streams.disk
        # How many wait for bytes, at any speed they can have, and until when somebody is as good as waiting.
        self._waiting_count = 0
        self._eager_until_s = float("-inf")
        # Of the stream: how it gives back its slot, None once it has; its pause, None while it has none.
        self._give_back_slot: Callable[[], None] | None = None
        self._pause: trio.CancelScope | None = None
        self._must_end = False

    @contextmanager
    def off(self) -> Iterator[None]:
        """Slow nothing down in the block: somebody waits for bytes there, and may do so again soon after."""
        self._waiting_count += 1
        self._end_pause()
        try:
            yield
        finally:
            self._waiting_count -= 1
            self._eager_until_s = trio.current_time() + EAGER_S

    @contextmanager
    def stream(self, give_back_slot: Callable[[], None]) -> Iterator[None]:
        """Have the image's stream in the block; its slot is given back at the end, or when it is slowed down."""
        self._must_end = False
        self._give_back_slot = give_back_slot
        try:
            yield
        finally:
            self._slow_streams.leave(self)
            self._leave_slot()

    async def pay(self, size_bytes: int) -> bool:
        """Wait as long as these bytes of the stream are worth, if nobody waits for any; False: it must end now.

        While the cache's disk is not normal nothing more is taken for nobody.
        """
        is_free = self._disk.is_normal and not self._pace.bytes_per_s
        if is_free or self._is_wanted():
            return True
        if self._give_back_slot is not None and self._slow_streams.enter(self):
            self._leave_slot()
        if not self._disk.is_normal:
            await self._pause_until(self._disk.wait_normal, DISK_PAUSE_MAX_S)
            self._must_end |= not (self._disk.is_normal or self._is_wanted())
        elif self._pace.bytes_per_s:
            now_s = trio.current_time()
            self._pace.spend(size_bytes, now_s)
            # Once only: were it asked again, what others have spent meanwhile would keep this one waiting for ever.
            await self._pause_until(trio.sleep_forever, self._pace.wait_s(now_s))
        return not self._must_end

    def _is_wanted(self) -> bool:
        return self._waiting_count > 0 or trio.current_time() < self._eager_until_s

    async def _pause_until(self, wait: Callable[[], Awaitable[None]], limit_s: float) -> None:
        with trio.move_on_after(limit_s) as self._pause:
            await wait()
        self._pause = None

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.cancel()

    def end_nowait(self) -> bool:
        """End the stream if it pauses: nobody waits for what it brings."""
        may_end = self._pause is not None and not self._waiting_count
        if may_end:
            self._must_end = True
            self._end_pause()
        return may_end

    def _leave_slot(self) -> None:
        give_back, self._give_back_slot = self._give_back_slot, None
        if give_back is not None:
            give_back()
