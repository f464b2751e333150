"""Opening a published image: once for all who ask, and never a lookup without end."""

from __future__ import annotations

import pytest
import trio
from image_fakes import ImageRig
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import LookupUndecided
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.chunkfile import ChunkFile

SIZE_BYTES = 40 * CHUNK


async def undecided(catalog: Catalog, name: str) -> None:
    with pytest.raises(LookupUndecided):
        await catalog.lookup(name)


async def test_image_is_opened_once(rig: ImageRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who need an image that is not open yet wait for one opening, and share its outcome."""
    record = rig.glance.add(1, SIZE_BYTES)
    assert await rig.catalog().lookup(record.base_name)
    rig.cache.close_image(record.key("stored"))
    made: list[LazyImage] = []
    make = rig.make_image

    async def slowly(record: ImageRecord, file: ChunkFile, _head: bytes | None) -> LazyImage:
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        made.append(make(record, file))
        return made[-1]

    monkeypatch.setattr(rig, "make", slowly)
    successor = rig.catalog()
    found: list[LazyImage | None] = []

    async def look() -> None:
        found.append(await successor.lookup(record.base_name))

    async with trio.open_nursery() as lookers:
        for _ in range(5):
            lookers.start_soon(look)
    assert found == made * 5


async def test_known_name_that_cannot_be_opened_in_time_hangs_nobody(
    rig: ImageRig,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[I6] A published image whose header must be fetched again is undecided after `lookup_timeout`, and then found."""
    record = rig.glance.add(1, SIZE_BYTES)
    assert await rig.catalog().lookup(record.base_name)
    rig.cache.close_image(record.key("stored"))
    waits = trio.Event()

    async def hang(*_args: object) -> LazyImage:
        waits.set()
        await trio.sleep_forever()
        raise AssertionError("unreachable")

    successor = rig.catalog()
    with monkeypatch.context() as patch:
        patch.setattr(rig, "make", hang)
        async with trio.open_nursery() as readers:
            readers.start_soon(undecided, successor, record.base_name)
            await waits.wait()
            mock_clock.jump(2.1)
    assert await successor.lookup(record.base_name)
