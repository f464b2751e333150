"""How much may be written to the cache, and what is dropped to make room."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from store_images import chunks_content, image_entry
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.space import CHECK_INTERVAL_S, CHECK_PAUSE_S, CacheSpace
from lazyimg.store.cachedir import CacheDir

COUNT = 8
SIZE_BYTES = COUNT * CHUNK
# Room for four images; an eighth of it is margin, so three and a half are kept without dropping any.
MAX_BYTES = 4 * SIZE_BYTES
PLENTY = 1 << 40


def fill(cache: CacheDir, number: int, *, count: int = COUNT) -> str:
    """Have an image in the cache, used at the second of its number; return its key."""
    entry = replace(image_entry(number, SIZE_BYTES), last_used_s=float(number))
    cache.index.put(entry)
    file = cache.open_image(entry.key)
    file.write(0, chunks_content(number, 0, count, SIZE_BYTES))
    file.commit()
    cache.close_image(entry.key)
    return entry.key


class Rig:
    """The room of a cache, kept; what is busy and what eviction refuses are the test's to say."""

    def __init__(
        self, cache: CacheDir, clock: MockClock, *, size_max_bytes: int = MAX_BYTES, free_min_bytes: int = 0
    ) -> None:
        self.cache = cache
        self.clock = clock
        self.busy: set[str] = set()
        self.refused: set[str] = set()
        self.evicted: list[str] = []
        self.error: OSError | None = None
        self.limiter = trio.CapacityLimiter(1)
        self.disk = DiskHealth(cache.path, cache.probe, timeout_s=10)
        self.space = CacheSpace(
            cache, self.disk, self.limiter, size_max_bytes=size_max_bytes, free_min_bytes=free_min_bytes
        )

    async def start(self, nursery: trio.Nursery) -> None:
        await nursery.start(self.space.keep_room, lambda: self.busy, self.evict)

    async def evict(self, key: str) -> bool:
        if self.error is not None:
            raise self.error
        if key in self.refused:
            return False
        self.evicted.append(key)
        await trio.to_thread.run_sync(self.cache.remove_image, key, limiter=self.limiter)
        return True

    async def check_again(self) -> None:
        """Let the next check run to its end."""
        for pause_s in (CHECK_INTERVAL_S, CHECK_PAUSE_S):
            await wait_all_tasks_blocked()
            self.clock.jump(pause_s)
        await wait_all_tasks_blocked()
        while self.limiter.borrowed_tokens:
            await wait_all_tasks_blocked(0.001)

    def room_bytes(self) -> int:
        """Return how much may still be stored, by taking it chunk by chunk and giving it up again."""
        taken = 0
        while self.space.may_store(CHUNK):
            taken += CHUNK
        self.space.stored(taken)
        return taken


async def test_nothing_is_stored_before_the_room_is_known(cache: CacheDir, mock_clock: MockClock) -> None:
    """[I5] Until the disk was measured there is no room; once the keeper has started there is."""
    rig = Rig(cache, mock_clock)
    assert not rig.space.may_store(1)
    async with trio.open_nursery() as nursery:
        await rig.start(nursery)
        assert rig.space.may_store(1)
        nursery.cancel_scope.cancel()


async def test_room_is_never_overrun(cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery) -> None:
    """[I5] No more may be stored than fits below the limit, to the byte."""
    fill(cache, 1)
    rig = Rig(cache, mock_clock)
    await rig.start(nursery)
    room_bytes = rig.room_bytes()
    assert MAX_BYTES - SIZE_BYTES - 2 * CHUNK <= room_bytes <= MAX_BYTES - SIZE_BYTES
    assert not rig.space.may_store(CHUNK)


async def test_bytes_on_their_way_to_the_disk_are_not_room(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """[I5] What was taken and is not written yet would be measured as free; it is not given out twice."""
    expected_warnings("full; serving without storing")
    rig = Rig(cache, mock_clock)
    await rig.start(nursery)
    while rig.space.may_store(CHUNK):
        pass
    await rig.check_again()
    assert not rig.space.may_store(CHUNK)
    rig.space.stored(2 * CHUNK)
    await rig.check_again()
    # Given up, or it would be on the disk: two chunks are free again.
    assert rig.room_bytes() == 2 * CHUNK


async def test_least_recently_used_images_go_first(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Above the limit the oldest go, as few as are needed, and the room is what they leave."""
    keys = [fill(cache, number) for number in (1, 2, 3, 4, 5)]
    rig = Rig(cache, mock_clock)
    await rig.start(nursery)
    assert rig.evicted == keys[:2]
    assert rig.space.may_store(CHUNK)
    assert {entry.key for entry in cache.index.entries()} == set(keys[2:])


async def test_busy_images_stay(cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery) -> None:
    """[I7] Images that are open or gone from Glance are kept, and younger ones go in their place."""
    keys = [fill(cache, number) for number in (1, 2, 3, 4, 5)]
    rig = Rig(cache, mock_clock)
    rig.busy = {keys[0], keys[2]}
    await rig.start(nursery)
    assert rig.evicted == [keys[1], keys[3]]


async def test_image_that_may_not_be_dropped_after_all_is_passed_over(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery
) -> None:
    """[I7] One whose eviction is refused stays, and the check ends all the same."""
    keys = [fill(cache, number) for number in (1, 2, 3, 4, 5)]
    rig = Rig(cache, mock_clock)
    rig.refused = {keys[0]}
    await rig.start(nursery)
    assert rig.evicted == keys[1:3]


async def test_full_cache_stores_nothing_and_recovers(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """[I5] With everything busy nothing may be stored; as soon as something may go, there is room again."""
    expected_warnings("full; serving without storing")
    keys = [fill(cache, number) for number in (1, 2, 3, 4)]
    rig = Rig(cache, mock_clock)
    rig.busy = set(keys)
    await rig.start(nursery)
    assert rig.space.is_full
    assert not rig.space.may_store(1)
    rig.busy = set(keys[1:])
    await rig.check_again()
    assert rig.evicted == keys[:1]
    assert not rig.space.is_full
    assert rig.space.may_store(CHUNK)


async def test_free_space_is_kept_on_the_disk(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I5] Other users of the disk make the cache smaller: it drops images, and never takes the last free bytes."""
    keys = [fill(cache, number) for number in (1, 2)]
    rig = Rig(cache, mock_clock, size_max_bytes=0, free_min_bytes=PLENTY)
    free_bytes = [PLENTY + (1 << 30)]
    monkeypatch.setattr(cache, "free_bytes", lambda: free_bytes[0])
    await rig.start(nursery)
    assert rig.evicted == []
    free_bytes[0] = PLENTY + 3 * CHUNK
    rig.busy = {keys[1]}
    await rig.check_again()
    assert rig.evicted == keys[:1]
    assert rig.room_bytes() == 3 * CHUNK


async def test_failed_write_stops_storing_until_the_next_check(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """A disk that refused a write is told once, left alone, and tried again after a while."""
    expected_warnings("injected; serving without storing")
    rig = Rig(cache, mock_clock)
    await rig.start(nursery)
    for _ in range(3):
        rig.space.storing_failed(OSError(errno.ENOSPC, "injected"))
        assert not rig.space.may_store(1)
    await rig.check_again()
    assert rig.space.may_store(1)


async def test_disk_that_cannot_be_asked_ends_nothing(
    cache: CacheDir, mock_clock: MockClock, nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """[I6] A check that fails means no room, and is made again."""
    expected_warnings("injected; serving without storing", required=False)
    keys = [fill(cache, number) for number in (1, 2, 3, 4)]
    rig = Rig(cache, mock_clock)
    rig.error = OSError(errno.EIO, "injected")
    await rig.start(nursery)
    assert not rig.space.may_store(1)
    rig.error = None
    await rig.check_again()
    assert rig.evicted == keys[:1]
    assert rig.space.may_store(1)
