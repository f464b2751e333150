"""While something is wrong with the cache's disk nothing is done for nobody, and who asks for a check is told so."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest
import trio
from image_fakes import MIB, ImageRig, Reply, entry_of
from store_images import content
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.diskstate import PROBE_PAUSE_S
from lazyimg.core.pace import Pace
from lazyimg.errors import CacheUnusable, ChunkUnreadable
from lazyimg.image.brake import DISK_PAUSE_MAX_S, EAGER_S
from lazyimg.image.catalog import Catalog
from lazyimg.image.hydrator import Hydrator
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.sourcecheck import AGAIN_S, LOOK_INTERVAL_S, SourceCheck
from lazyimg.store.chunkfile import ChunkFile

COUNT = 40
SIZE_BYTES = COUNT * CHUNK
EIO = OSError(errno.EIO, "injected")
LOOK_S = int(LOOK_INTERVAL_S) + 1


class Trouble:
    """Has the gate see errors of the disk, and its good end, when a test says so."""

    def __init__(self, rig: ImageRig, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rig = rig
        self.now_s = 0.0
        monkeypatch.setattr(rig.disk, "_clock", lambda: self.now_s)

    async def begin(self, state: str = "unstable") -> None:
        def fail() -> None:
            raise EIO

        while self._rig.disk.statistics().state != state:
            with pytest.raises(OSError, match="injected"):
                await self._rig.disk.read(fail, limiter=self._rig.read_limiter)

    async def look(self, later_s: float) -> None:
        self.now_s += later_s
        async with trio.open_nursery() as nursery:
            self._rig.disk.look(nursery)

    async def end(self) -> None:
        while not self._rig.disk.is_normal:
            await self.look(PROBE_PAUSE_S)


@pytest.fixture
def trouble(
    rig: ImageRig, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> Trouble:
    expected_warnings("used on and watched", "not used from here on", required=False)
    return Trouble(rig, monkeypatch)


class Held:
    """One image, held open; there is room."""

    is_full = False

    def __init__(self, image: LazyImage) -> None:
        self._image = image

    def open_images(self) -> list[LazyImage]:
        return [self._image]

    async def held_images(self) -> list[LazyImage]:
        await trio.lowlevel.checkpoint()
        return [self._image]


def hydrated(rig: ImageRig) -> LazyImage:
    """Return an image that is being hydrated."""
    image = rig.add(1, SIZE_BYTES)
    image.opened()
    held = Held(image)
    rig.nursery.start_soon(Hydrator(held, held, rig.disk, Pace(0), delay_s=0).run)
    return image


async def whole(rig: ImageRig, catalog: Catalog, size_bytes: int = SIZE_BYTES) -> LazyImage:
    """Return an image all of which is here, durably."""
    image = await catalog.find(rig.glance.add(1, size_bytes).id)
    async for _ in image.prefetch():
        pass
    await image.commit()
    return image


# ── hydration ──


@pytest.mark.parametrize("state", ["unstable", "bypass"])
async def test_nothing_is_hydrated_meanwhile(
    rig: ImageRig, trouble: Trouble, mock_clock: MockClock, state: str
) -> None:
    """What could not be kept is not asked for; as soon as the disk is normal the rest comes."""
    await trouble.begin(state)
    image = hydrated(rig)
    await rig.pass_time(mock_clock, 30)
    assert rig.glance.ranges == []
    await trouble.end()
    await rig.pass_time(mock_clock, 3)
    assert image.is_whole


async def test_step_under_way_ends(rig: ImageRig, trouble: Trouble, mock_clock: MockClock) -> None:
    """A disk that begins to fail ends the step: nothing more is asked for it, and the image is not to blame."""
    rig.request_bytes_max = 2 * CHUNK
    image = hydrated(rig)
    gate = trio.Event()
    rig.glance.always.gate = gate
    await rig.pass_time(mock_clock, 2)
    out = len(rig.glance.ranges)
    assert 0 < out < COUNT // 2
    await trouble.begin()
    gate.set()
    await rig.pass_time(mock_clock, 10)
    assert len(rig.glance.ranges) == out
    await trouble.end()
    await rig.pass_time(mock_clock, 3)
    assert image.is_whole


async def test_what_could_not_be_stored_is_stored_then(
    rig: ImageRig, trouble: Trouble, mock_clock: MockClock
) -> None:
    """Chunks that came while nothing was written are in memory, and a step of hydration waits until they are stored."""
    await trouble.begin("bypass")
    image = rig.add(1, SIZE_BYTES)
    await image.read(0, SIZE_BYTES)
    assert image.present_bytes == 0
    await trouble.end()
    await rig.budget.take(64 * MIB)
    is_over = trio.Event()

    async def step() -> None:
        await image.hydrate(SIZE_BYTES)
        is_over.set()

    rig.nursery.start_soon(step)
    await rig.pass_time(mock_clock, 3)
    assert not is_over.is_set(), "nothing can be stored yet"
    rig.budget.give_back(64 * MIB)
    await rig.pass_time(mock_clock, 1)
    assert is_over.is_set()
    assert (image.is_whole, rig.glance.sent_bytes) == (True, SIZE_BYTES)


# ── a stream ──


@pytest.fixture
async def stream(rig: ImageRig, mock_clock: MockClock) -> LazyImage:
    """An image whose stream has come to half of it, and whose guest waits for nothing more."""
    image = rig.add(1, SIZE_BYTES)
    image.fetcher.ladder.source = "stream"
    image.opened()
    rig.glance.replies.append(reply := Reply(hold_at_bytes=SIZE_BYTES // 2))
    await image.read(0, 10)
    rig.nursery.start_soon(_set_after, EAGER_S + 1, reply.resume)
    return image


async def _set_after(seconds: float, event: trio.Event) -> None:
    await trio.sleep(seconds)
    event.set()


async def test_stream_stops_and_goes_on(
    rig: ImageRig, stream: LazyImage, trouble: Trouble, mock_clock: MockClock
) -> None:
    """A stream that nobody waits for is held while the disk is not normal, and goes on where it was."""
    await trouble.begin()
    await rig.pass_time(mock_clock, int(EAGER_S) + 10)
    assert rig.glance.sent_bytes < SIZE_BYTES // 2 + CHUNK
    await trouble.end()
    await rig.pass_time(mock_clock, 1)
    assert (rig.glance.sent_bytes, rig.glance.streams) == (SIZE_BYTES, 1)


async def test_stream_of_a_disk_that_stays_bad_ends(
    rig: ImageRig, stream: LazyImage, trouble: Trouble, mock_clock: MockClock
) -> None:
    """[I5] It is not held for ever: Glance has other use for its worker."""
    await trouble.begin("bypass")
    await rig.pass_time(mock_clock, int(EAGER_S + DISK_PAUSE_MAX_S) + 3)
    assert rig.glance.sent_bytes < SIZE_BYTES // 2 + CHUNK
    assert stream.fetcher.is_idle


async def test_guest_has_the_stream_all_the_same(
    rig: ImageRig, stream: LazyImage, trouble: Trouble, mock_clock: MockClock
) -> None:
    """[I4] Whatever the disk does, a guest's read is served from the stream at once."""
    await trouble.begin("bypass")
    await rig.pass_time(mock_clock, int(EAGER_S) + 10)
    at, began_s = SIZE_BYTES - 100, trio.current_time()
    assert await stream.read(at, 100) == content(1, at, SIZE_BYTES)
    assert (trio.current_time(), rig.glance.streams) == (began_s, 1)


# ── the check of the source's hash ──


async def test_hash_is_compared_when_the_disk_is_normal(
    rig: ImageRig, catalog: Catalog, trouble: Trouble, mock_clock: MockClock
) -> None:
    """A disk that fails is not read for it; as soon as it is normal the image is compared."""
    image = await whole(rig, catalog)
    await trouble.begin()
    rig.nursery.start_soon(SourceCheck(catalog, rig.disk, rig.hash_limiter, None, bytes_per_s=0).run)
    await rig.pass_time(mock_clock, LOOK_S)
    assert not entry_of(catalog, image).verified
    await trouble.end()
    await rig.pass_time(mock_clock, LOOK_S)
    assert entry_of(catalog, image).verified


async def test_comparison_that_hung_is_made_again_soon(
    rig: ImageRig,
    catalog: Catalog,
    trouble: Trouble,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that hangs costs the comparison no more than that time, and what then comes late changes no hash."""
    image = await whole(rig, catalog)
    honest, hangs, goes_on = image.stored, threading.Event(), threading.Event()

    def stored(start: int, stop: int) -> bytes:
        hangs.set()
        assert goes_on.wait(60)
        return honest(start, stop)

    monkeypatch.setattr(image, "stored", stored)
    rig.nursery.start_soon(SourceCheck(catalog, rig.disk, rig.hash_limiter, None, bytes_per_s=0).run)
    try:
        while not hangs.is_set():
            await wait_all_tasks_blocked(0.001)
        await trouble.look(11)
        assert not rig.disk.may_read
    finally:
        goes_on.set()
    await rig.pass_time(mock_clock, LOOK_S)
    assert not entry_of(catalog, image).verified
    await trouble.end()
    await rig.pass_time(mock_clock, LOOK_S)
    assert entry_of(catalog, image).verified


async def test_comparison_that_met_a_bad_sector_is_made_again_late(
    rig: ImageRig,
    catalog: Catalog,
    trouble: Trouble,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One error of a disk that is well again is not asked for again and again."""
    image = await whole(rig, catalog)
    reads = 0

    def stored(start: int, stop: int) -> bytes:
        nonlocal reads
        reads += 1
        raise EIO

    monkeypatch.setattr(image, "stored", stored)
    rig.nursery.start_soon(SourceCheck(catalog, rig.disk, rig.hash_limiter, None, bytes_per_s=0).run)
    await rig.pass_time(mock_clock, LOOK_S)
    await trouble.end()
    await rig.pass_time(mock_clock, 10 * LOOK_S)
    assert reads == 1
    await rig.pass_time(mock_clock, int(AGAIN_S))
    assert reads == 2


# ── `lazyimg verify` ──


async def test_verify_says_that_the_disk_is_not_normal(
    rig: ImageRig, catalog: Catalog, trouble: Trouble
) -> None:
    """It reads nothing, and names the state, the reason and what to do, in one line; normal again, it does its work."""
    image = await whole(rig, catalog)
    await trouble.begin()
    with pytest.raises(
        CacheUnusable, match=r"is unstable, .*injected.*run it again once .* normal"
    ) as caught:
        await image.verify(lambda done, total: None)
    assert "\n" not in str(caught.value)
    await trouble.end()
    assert await image.verify(lambda done, total: None) == (0, "match")


async def test_verify_of_a_disk_that_hangs_ends(
    rig: ImageRig, catalog: Catalog, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I5] Nobody waits for a disk that does not answer, beyond its limit."""
    image = await whole(rig, catalog)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(file: ChunkFile, chunks: range) -> tuple[int, list[int]]:
        hangs.set()
        assert goes_on.wait(60)
        return 0, []

    monkeypatch.setattr(ChunkFile, "verify", hang)
    errors: list[CacheUnusable] = []

    async def verify() -> None:
        try:
            await image.verify(lambda done, total: None)
        except CacheUnusable as exc:
            errors.append(exc)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(verify)
            while not hangs.is_set():
                await wait_all_tasks_blocked(0.001)
            await trouble.look(11)
        assert "its state is bypass, hang takes longer than 10 s" in str(*errors)
    finally:
        goes_on.set()


async def test_verify_gives_up_nothing_of_a_disk_that_fails(
    rig: ImageRig, catalog: Catalog, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I1] Chunks that a failing disk does not read are kept, since it may have them all when it is back."""
    image = await whole(rig, catalog)
    calls = 0

    def fail(file: ChunkFile, chunks: range) -> tuple[int, list[int]]:
        nonlocal calls
        calls += 1
        raise ChunkUnreadable("cannot be read", list(chunks)) from EIO

    with monkeypatch.context() as patch:
        patch.setattr(ChunkFile, "verify", fail)
        with pytest.raises(CacheUnusable, match="is bypass"):
            await image.verify(lambda done, total: None)
    assert calls == 3
    assert image.is_whole
    await trouble.end()
    assert await image.verify(lambda done, total: None) == (0, "match")


async def test_verify_gives_up_a_bad_sector(
    rig: ImageRig, catalog: Catalog, trouble: Trouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that alone cannot be read counts as damaged, once all others were checked, and is fetched anew."""
    image = await whole(rig, catalog)
    honest = ChunkFile.verify

    def verify(file: ChunkFile, chunks: range) -> tuple[int, list[int]]:
        if 20 in chunks:
            raise ChunkUnreadable("cannot be read", [20, 21]) from EIO
        return honest(file, chunks)

    monkeypatch.setattr(ChunkFile, "verify", verify)
    steps: list[tuple[int, int]] = []
    assert await image.verify(lambda *step: steps.append(step)) == (2, "unknown")
    assert steps[-1] == (SIZE_BYTES, SIZE_BYTES)
    assert image.missing_bytes == 2 * CHUNK
    assert await image.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
