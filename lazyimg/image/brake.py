"""How fast a stream brings what nobody waits for: as fast as hydration may, and at full speed once somebody waits.

A stream goes to its end, since the next would begin at zero again: at a low `hydrate_rate` that takes hours.  Guards
I4: one that is slowed down gives its flight's slot back, so that it is in no urgent want's way; and I5: of all images
only SLOW_STREAMS_MAX go on without a slot, and for another one of them is ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from lazyimg.core.pace import SLOW_STREAMS_MAX, Pace

# A stream stays at full speed for so long after the last who waited: a booting guest waits for one part of the image
# after another, and would wait longer for the next if the stream had not gone on meanwhile.
EAGER_S = 5.0


class SlowStreams:
    """The streams of all images that are slowed down, in the order in which they were."""

    def __init__(self, pace: Pace) -> None:
        """pace: of all that is fetched for nobody; hydration's own."""
        self.pace = pace
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
        self._pace = slow_streams.pace
        # How many wait for bytes, at any speed they can have, and until when somebody is as good as waiting.
        self._waiting_count = 0
        self._eager_until_s = float("-inf")
        # Of the stream: how it gives back its slot, None once it has; whether it pauses, and must end.
        self._give_back_slot: Callable[[], None] | None = None
        self._is_pausing = self._must_end = False
        self._pause_over = trio.Event()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Slow nothing down in the block: somebody waits for bytes there, and may do so again soon after."""
        self._waiting_count += 1
        self._pause_over.set()
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
        """Wait as long as these bytes of the stream are worth, if nobody waits for any; False: it must end now."""
        now_s = trio.current_time()
        if not self._pace.bytes_per_s or self._waiting_count or now_s < self._eager_until_s:
            return True
        if self._give_back_slot is not None and self._slow_streams.enter(self):
            self._leave_slot()
        self._pace.spend(size_bytes, now_s)
        self._is_pausing, self._pause_over = True, trio.Event()
        try:
            # Once only: were it asked again, what others have spent meanwhile would keep this one waiting for ever.
            with trio.move_on_after(self._pace.wait_s(now_s)):
                await self._pause_over.wait()
        finally:
            self._is_pausing = False
        return not self._must_end

    def end_nowait(self) -> bool:
        """End the stream if it pauses: nobody waits for what it brings."""
        may_end = self._is_pausing and not self._waiting_count
        if may_end:
            self._must_end = True
            self._pause_over.set()
        return may_end

    def _leave_slot(self) -> None:
        give_back, self._give_back_slot = self._give_back_slot, None
        if give_back is not None:
            give_back()
