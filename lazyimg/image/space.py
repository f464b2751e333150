"""How much may still be written to the cache, and what is dropped to make room.

Guards I5 and I7: never above the limits, never an image that is open or that Glance no longer has.  Where no
room can be made, guests are served without storing.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from lazyimg.core.diskstate import FAULTS
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.eviction import to_evict

logger = logging.getLogger(__name__)

# Looked again this often: others write to the same file system too.
CHECK_INTERVAL_S = 5
# Shortest time between two checks.
CHECK_PAUSE_S = 1
# Images are dropped this much before a limit is reached, so that writes go on meanwhile.
MARGIN_BYTES_MAX = 256 << 20


class CacheSpace:
    """The room left in the cache, kept by `keep_room`."""

    def __init__(
        self,
        cache: CacheDir,
        disk: DiskHealth,
        limiter: trio.CapacityLimiter,
        *,
        size_max_bytes: int,
        free_min_bytes: int,
    ) -> None:
        self._cache = cache
        self._disk = disk
        self._limiter = limiter
        self._size_max_bytes = size_max_bytes
        self._free_min_bytes = free_min_bytes
        # Of a small cache an eighth.
        self._margin_bytes = min(MARGIN_BYTES_MAX, size_max_bytes // 8 or MARGIN_BYTES_MAX)
        self._room_bytes = 0
        self._used_bytes = 0
        # Bytes ever taken of the room, and of those ever written or given up.  What lies between the two is not on
        # the disk yet and would be measured as free.
        self._taken_bytes = 0
        self._stored_bytes = 0
        self._check_wanted = trio.Event()
        self._is_full_told = False

    @property
    def is_full(self) -> bool:
        return self._room_bytes <= 0

    @property
    def used_bytes(self) -> int:
        """What images took on the disk when it was measured last."""
        return self._used_bytes

    def may_store(self, size_bytes: int) -> bool:
        """Take this much of the room, or say that there is none."""
        if self._room_bytes < size_bytes:
            self._check_wanted.set()
            return False
        self._room_bytes -= size_bytes
        self._taken_bytes += size_bytes
        return True

    def stored(self, size_bytes: int) -> None:
        """What was taken is on the disk now, or given up."""
        self._stored_bytes += size_bytes

    def storing_failed(self, error: OSError) -> None:
        """A write failed: store nothing until there is room again."""
        if self._room_bytes > 0:
            logger.warning("cache %s: %s; serving without storing for now", self._cache.path, error)
        self._room_bytes = 0
        self._is_full_told = True

    async def keep_room(
        self,
        busy_keys: Callable[[], set[str]],
        evict: Callable[[str], Awaitable[bool]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Check the limits now and then and drop images until they hold; runs until cancelled.

        busy_keys: images that must stay.  evict: drops one, False if it may not be dropped after all.
        """
        while True:
            await self._check(busy_keys, evict)
            task_status.started()
            task_status = trio.TASK_STATUS_IGNORED
            with trio.move_on_after(CHECK_INTERVAL_S):
                await self._check_wanted.wait()
            # A disk that stays full is asked about once a second, not for each chunk that arrives.
            await trio.sleep(CHECK_PAUSE_S)
            self._check_wanted = trio.Event()

    async def _check(
        self, busy_keys: Callable[[], set[str]], evict: Callable[[str], Awaitable[bool]]
    ) -> None:
        kept: set[str] = set()
        try:
            while True:
                stored_bytes = self._stored_bytes
                victims, room_bytes = await self._disk.read(
                    self._measure, busy_keys(), kept, limiter=self._limiter
                )
                if not victims:
                    break
                if not await evict(victims[0]):
                    kept.add(victims[0])
        except OSError as exc:
            # While the disk fails nothing is written anyway, and what was known of its room is as good as any guess.
            if exc.errno not in FAULTS:
                self.storing_failed(exc)
            return
        # All that was taken and not known to be written when the disk was measured.
        room_bytes -= self._taken_bytes - stored_bytes
        self._room_bytes = room_bytes
        if room_bytes <= 0 and not self._is_full_told:
            logger.warning("cache %s: full; serving without storing for now", self._cache.path)
        self._is_full_told = room_bytes <= 0

    def _measure(self, busy_keys: set[str], kept: set[str]) -> tuple[list[str], int]:
        """Return what to drop, and the room there is now (thread)."""
        images = [(entry, self._cache.allocated_bytes(entry.key)) for entry in self._cache.index.entries()]
        self._used_bytes = sum(size for _, size in images)
        free_bytes = self._cache.free_bytes()
        victims = to_evict(
            images,
            busy_keys,
            kept,
            self._size_max_bytes and self._size_max_bytes - self._margin_bytes,
            free_bytes,
            self._free_min_bytes + self._margin_bytes,
        )
        room_bytes = free_bytes - self._free_min_bytes
        if self._size_max_bytes:
            room_bytes = min(room_bytes, self._size_max_bytes - self._used_bytes)
        return victims, room_bytes
