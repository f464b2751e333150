"""An image whose cache disk fails or hangs: its bytes come from Glance, and from the disk again when that is back."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator

import pytest
import trio
from image_fakes import ImageRig, wait_until
from store_images import content
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import GlanceUnavailable, ImageNotFound, LookupUndecided
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store import fileio
from lazyimg.store.chunkfile import ChunkFile
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index

COUNT = 20
SIZE_BYTES = COUNT * CHUNK - 100
WHOLE = content(1, 0, SIZE_BYTES)


class HangingDisk:
    """Makes reads and writes of chunk files hang, and time pass for the gate to the disk."""

    def __init__(self, rig: ImageRig, monkeypatch: pytest.MonkeyPatch) -> None:
        self._goes_on = threading.Event()
        self._goes_on.set()
        self._rig = rig
        self.now_s = 0.0
        self.hanging = 0
        monkeypatch.setattr(rig.disk, "_clock", lambda: self.now_s)
        for name in ("read", "write", "commit"):
            monkeypatch.setattr(ChunkFile, name, self._hanging(getattr(ChunkFile, name)))

    def _hanging(self, function: Callable[..., object]) -> Callable[..., object]:
        def hang(*args: object) -> object:
            self.hanging += 1
            assert self._goes_on.wait(60)
            return function(*args)

        return hang

    def hang(self) -> None:
        self._goes_on.clear()
        self.hanging = 0

    async def look(self, later_s: float) -> None:
        """Let time pass, and the gate look."""
        self.now_s += later_s
        async with trio.open_nursery() as nursery:
            self._rig.disk.look(nursery)

    async def bypass(self) -> None:
        """Have something hang until the disk is bypassed."""
        while not self.hanging:
            await wait_all_tasks_blocked(0.001)
        await self.look(11)
        assert not self._rig.disk.may_read

    async def come_back(self) -> None:
        """Let all go on until the disk is used again."""
        self._goes_on.set()
        while not self._rig.disk.may_write:
            await wait_all_tasks_blocked(0.001)
            await self.look(20)

    def end(self) -> None:
        self._goes_on.set()


@pytest.fixture
def image(rig: ImageRig) -> LazyImage:
    return rig.add(1, SIZE_BYTES)


@pytest.fixture
def disk(rig: ImageRig, monkeypatch: pytest.MonkeyPatch) -> Iterator[HangingDisk]:
    disk = HangingDisk(rig, monkeypatch)
    yield disk
    disk.end()


async def make_present(rig: ImageRig, image: LazyImage) -> LazyImage:
    """Have an image wholly on file, and opened anew: nothing of it is proven."""
    await image.fetcher.fetch(range(COUNT))
    await rig.wait_written()
    await image.commit()
    rig.glance.ranges.clear()
    return rig.open_again(image)


async def read_all(image: LazyImage) -> None:
    assert await image.read(0, SIZE_BYTES) == WHOLE


async def test_present_bytes_come_from_glance_while_the_disk_hangs(
    rig: ImageRig, image: LazyImage, disk: HangingDisk, expected_warnings: Callable[..., None]
) -> None:
    """[I6] A read that the disk keeps waiting is served by Glance after disk_timeout, later ones at once."""
    expected_warnings("takes longer", "used on and watched")
    image = await make_present(rig, image)
    disk.hang()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, image)
        await disk.bypass()
    assert rig.glance.ranges
    await read_all(image)
    assert disk.hanging == 1
    assert rig.disk.statistics().bypassed_bytes >= SIZE_BYTES
    await disk.come_back()
    rig.glance.ranges.clear()
    await read_all(image)
    assert rig.glance.ranges == []


async def test_read_waits_for_glance_and_disk_at_once(
    rig: ImageRig, image: LazyImage, disk: HangingDisk, expected_warnings: Callable[..., None]
) -> None:
    """[I1] With disk and Glance both away, a read of present bytes ends when the disk is back first."""
    expected_warnings("takes longer", "used on and watched")
    # Said if an attempt ends before the read does.
    expected_warnings("trying again in", required=False)
    image = await make_present(rig, image)
    rig.glance.always.error = GlanceUnavailable("down")
    disk.hang()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, image)
        await disk.bypass()
        await wait_all_tasks_blocked()
        assert rig.glance.ranges
        await disk.come_back()


async def test_image_that_glance_has_lost_waits_for_the_disk(
    rig: ImageRig, image: LazyImage, disk: HangingDisk, expected_warnings: Callable[..., None]
) -> None:
    """[I1] What Glance no longer has may be on a disk that hangs: a read of it waits for that, and ends well."""
    expected_warnings("takes longer", "used on and watched")
    image = await make_present(rig, image)
    image.fetcher.refuse(ImageNotFound("gone"))
    disk.hang()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_all, image)
        await disk.bypass()
        await wait_all_tasks_blocked()
        await disk.come_back()


async def test_image_that_glance_has_lost_waits_no_longer_than_any(
    rig: ImageRig,
    image: LazyImage,
    disk: HangingDisk,
    mock_clock: MockClock,
    expected_warnings: Callable[..., None],
) -> None:
    """If the disk does not come back within read_timeout, the read says that Glance does not have the image."""
    expected_warnings("takes longer", "used on and watched")
    image = await make_present(rig, image)
    image.fetcher.refuse(ImageNotFound("gone"))
    disk.hang()
    errors: list[ImageNotFound] = []

    async def read() -> None:
        with pytest.raises(ImageNotFound, match="gone") as caught:
            await read_all(image)
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await disk.bypass()
        await wait_all_tasks_blocked()
        mock_clock.jump(rig.read_timeout_s - 1)
        await wait_all_tasks_blocked()
        assert not errors
        mock_clock.jump(1)
    assert errors
    await disk.come_back()


async def test_what_came_meanwhile_is_stored_afterwards(
    rig: ImageRig, image: LazyImage, disk: HangingDisk, expected_warnings: Callable[..., None]
) -> None:
    """Absent bytes that were read while the disk hung are still in memory then, and stored when they are read again."""
    expected_warnings("takes longer", "used on and watched")
    disk.hang()
    assert await image.read(0, CHUNK) == WHOLE[:CHUNK]
    await disk.bypass()
    await read_all(image)
    assert image.present_bytes == 0
    await disk.come_back()
    rig.glance.ranges.clear()
    await read_all(image)
    assert rig.glance.ranges == []
    await rig.wait_written()
    assert image.is_whole


async def test_nothing_is_fetched_ahead_that_cannot_be_stored(
    rig: ImageRig, image: LazyImage, disk: HangingDisk, expected_warnings: Callable[..., None]
) -> None:
    """[I5] While the disk is bypassed a read asks for its own bytes alone."""
    expected_warnings("takes longer", "used on and watched")
    disk.hang()
    assert await image.read(0, CHUNK) == WHOLE[:CHUNK]
    await disk.bypass()
    rig.glance.ranges.clear()
    for chunk in range(10, 14):
        assert await image.read(chunk * CHUNK, CHUNK) == WHOLE[chunk * CHUNK :][:CHUNK]
    assert rig.glance.ranges == [(chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in range(10, 14)]
    await disk.come_back()


async def test_image_that_is_not_open_yet_needs_no_disk(
    rig: ImageRig, image: LazyImage, disk: HangingDisk, expected_warnings: Callable[..., None]
) -> None:
    """[I6] A published name whose chunk file was never opened is found and read while the disk hangs, and after."""
    expected_warnings("takes longer", "used on and watched")
    image = await make_present(rig, image)
    rig.cache.close_image(image.record.key("stored"))
    catalog = rig.catalog()
    other = rig.add(2, SIZE_BYTES)
    disk.hang()
    await other.read(0, CHUNK)
    await disk.bypass()
    found = await catalog.lookup(image.record.base_name)
    assert found is not None
    await catalog.set_mtime(found, 77)
    entry = catalog.entry_of(found)
    assert entry is not None
    assert entry.mtime_ns == 77
    await read_all(found)
    assert rig.glance.ranges
    await disk.come_back()
    rig.glance.ranges.clear()
    await read_all(found)
    assert rig.glance.ranges == []
    await catalog.tidy()
    assert rig.cache.index.get(entry.key) == entry


async def test_unreadable_chunk_is_given_up_once_glance_has_it(
    rig: ImageRig, image: LazyImage, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """A chunk that the disk fails to read stays while Glance is away too, and is fetched and stored anew after."""
    expected_warnings("used on and watched")
    # Said if an attempt ends before the read does.
    expected_warnings("trying again in", required=False)
    image = await make_present(rig, image)

    def fail(*_: object) -> bytes:
        raise OSError(errno.EIO, "injected")

    rig.glance.always.error = GlanceUnavailable("down")
    with monkeypatch.context() as patch:
        patch.setattr("lazyimg.store.chunkfile.pread_all", fail)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(image.read, 0, CHUNK)
            await wait_until(lambda: rig.glance.ranges)
            nursery.cancel_scope.cancel()
    assert image.is_whole
    assert await image.read(0, CHUNK) == WHOLE[:CHUNK]
    rig.glance.always.error = None
    again = rig.open_again(image)
    with monkeypatch.context() as patch:
        patch.setattr("lazyimg.store.chunkfile.pread_all", fail)
        assert await again.read(0, CHUNK) == WHOLE[:CHUNK]
    assert not again.is_whole
    assert fileio.pread_all is not fail
    await read_all(again)
    await rig.wait_written()
    assert again.is_whole


async def test_image_is_shown_only_once_that_is_durable(
    rig: ImageRig, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I9] What a guest may open is known to the next daemon: while the disk cannot keep a name it is undecided."""
    expected_warnings("used on and watched")
    record = rig.glance.add(1, SIZE_BYTES)
    catalog = rig.catalog()
    put = Index.put

    def fail_active(index: Index, *entries: ImageEntry) -> None:
        if any(entry.state == "active" for entry in entries):
            raise OSError(errno.EIO, "injected")
        put(index, *entries)

    with monkeypatch.context() as patch:
        patch.setattr(Index, "put", fail_active)
        with pytest.raises(LookupUndecided, match="injected"):
            await catalog.lookup(record.base_name)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    rig.cache.close_image(record.key("stored"))
    assert rig.catalog().key_of_inode(image.inode) == record.key("stored")
