"""Limits that all images share: flights at once, guesses waiting for one, and bytes received but not yet written.

Guards I4: no background flight starts while an urgent want waits for a slot; I5; and I6: some slots are kept for
lookups, so that an image whose bytes do not come keeps no other from being found.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import trio

# Pieces wanted in the background and not yet in flight, above which a guess of read-ahead is not taken in: of one
# image, as much as four of the widest requests, and of all together, some MB of memory.
IMAGE_GUESSES_MAX = 512
GUESSES_MAX = 4096
# One in so many slots is for lookups alone; they need it rarely, for the first MiB of a new image.
SLOTS_PER_LOOKUP_SLOT = 8


class Slots(Protocol):
    """Where an image's flights get leave to start."""

    @property
    def is_crowded(self) -> bool: ...

    @property
    def guesses(self) -> Guesses: ...

    def take_nowait(
        self, *, urgent: bool, when_free: Callable[[], None], for_lookup: bool = False
    ) -> bool: ...

    def give_back(self, *, urgent: bool) -> None: ...


class FlightSlots:
    """How many requests are out at once, over all images: those of lookups first, then urgent ones."""

    def __init__(self, requests_max: int, background_requests_max: int) -> None:
        self._free = requests_max
        self._kept_for_lookups = requests_max // SLOTS_PER_LOOKUP_SLOT
        self._background_free = background_requests_max
        # Who to call when a slot is free, in the order of asking; a dict so that nobody stands in it twice.
        self._lookups_waiting: dict[Callable[[], None], None] = {}
        self._urgent_waiting: dict[Callable[[], None], None] = {}
        self._background_waiting: dict[Callable[[], None], None] = {}
        self.guesses = Guesses()

    @property
    def is_crowded(self) -> bool:
        """True while readers wait for a slot: nothing should be asked for then that nobody waits for."""
        return bool(self._urgent_waiting)

    def take_nowait(self, *, urgent: bool, when_free: Callable[[], None], for_lookup: bool = False) -> bool:
        """Take a slot, or return False and call `when_free` once when it is worth trying again.

        for_lookup: of an urgent flight, that nothing but a lookup waits for it.
        """
        if urgent:
            if self._free > (0 if for_lookup else self._kept_for_lookups):
                self._free -= 1
                return True
            waiting = self._lookups_waiting if for_lookup else self._urgent_waiting
            waiting[when_free] = None
            return False
        if self._free > self._kept_for_lookups and self._background_free and not self._urgent_waiting:
            self._free -= 1
            self._background_free -= 1
            return True
        self._background_waiting[when_free] = None
        return False

    @asynccontextmanager
    async def background(self) -> AsyncIterator[None]:
        """Hold a slot for background work, waiting for its turn."""
        free = trio.Event()
        while not self.take_nowait(urgent=False, when_free=free.set):
            await free.wait()
            free = trio.Event()
        try:
            yield
        finally:
            self.give_back(urgent=False)

    def give_back(self, *, urgent: bool) -> None:
        """Return a slot and let the next in turn take it."""
        self._free += 1
        if not urgent:
            self._background_free += 1
        # Who is called may have no use for it any more, a pause or a reader that left: then the next is called,
        # or the slot would lie idle while others wait for it.
        while waiting := self._next_waiting():
            when_free = next(iter(waiting))
            del waiting[when_free]
            when_free()

    def _next_waiting(self) -> dict[Callable[[], None], None]:
        """Return those of whom the next in turn may take a slot now; empty if there are none."""
        if self._free and self._lookups_waiting:
            return self._lookups_waiting
        if self._free <= self._kept_for_lookups:
            return {}
        if not self._urgent_waiting and self._background_free:
            return self._background_waiting
        return self._urgent_waiting


class Guesses:
    """How many pieces all images want in the background."""

    def __init__(self) -> None:
        self._count_of: dict[object, int] = {}
        self._total = 0

    def note(self, image: object, count: int) -> None:
        """An image wants so many now."""
        self._total += count - self._count_of.pop(image, 0)
        if count:
            self._count_of[image] = count

    def room(self, image: object) -> int:
        """Return how many more this image may want."""
        return max(0, min(IMAGE_GUESSES_MAX - self._count_of.get(image, 0), GUESSES_MAX - self._total))


class ByteBudget:
    """Bytes received and not yet written; who receives more waits until some are written."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._taken = 0
        self._waiting = trio.lowlevel.ParkingLot()

    async def take(self, size_bytes: int) -> None:
        """Wait until there is room; one taker that is larger than everything goes through alone."""
        while self._taken and self._taken + size_bytes > self._bytes_max:
            await self._waiting.park()
        self._taken += size_bytes

    def give_back(self, size_bytes: int) -> None:
        self._taken -= size_bytes
        self._waiting.unpark_all()
