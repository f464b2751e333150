"""A whole image is compared with Glance's hash of it, once, and quarantined if it is another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from image_fakes import ImageRig, entry_of
from store_images import content, image_entry
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ImageQuarantined, InUse
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.sourcecheck import LOOK_INTERVAL_S, STEP_BYTES, SourceCheck, is_unproven
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index

SIZE_BYTES = 3 * CHUNK + 7
LOOK_S = int(LOOK_INTERVAL_S) + 1


def start(rig: ImageRig, catalog: Catalog, *, bytes_per_s: int = 0) -> None:
    rig.nursery.start_soon(
        SourceCheck(catalog, rig.disk, rig.hash_limiter, None, bytes_per_s=bytes_per_s).run
    )


async def whole(rig: ImageRig, catalog: Catalog, number: int = 1, **changes: object) -> LazyImage:
    """Return an image all of which is here, durably."""
    image = await catalog.find(rig.glance.add(number, SIZE_BYTES, **changes).id)
    await rig.wait_written()
    await image.commit()
    return image


async def test_right_image_is_verified_once(rig: ImageRig, catalog: Catalog, mock_clock: MockClock) -> None:
    """A match is kept durably, and the next daemon does not read the image again."""
    image = await whole(rig, catalog)
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    assert entry_of(catalog, image).verified
    assert not is_unproven(entry_of(rig.catalog(), image))
    assert ImageEntry.from_json(entry_of(catalog, image).to_json()).verified


async def test_wrong_image_is_quarantined(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Bytes that are not what the hash says are served no more, from the cache or the kernel's pages of it."""
    expected_warnings("image quarantined: .*not what Glance's sha512")
    image = await whole(rig, catalog, os_hash_value="0" * 128)
    assert image.read_nowait(0, 10) is not None
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    assert rig.forgotten == [image.inode]
    assert image.read_nowait(0, 10) is None
    with pytest.raises(ImageQuarantined, match="no byte of it is served"):
        await image.read(0, 10)
    entry = entry_of(catalog, image)
    assert (entry.state, entry.verified, entry.present_count) == ("quarantined", False, 4)
    assert entry.key in catalog.busy_keys()


async def test_quarantine_outlives_the_daemon(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I1] The next daemon serves no byte of it either, whatever Glance says of the image meanwhile."""
    expected_warnings("image quarantined")
    image = await whole(rig, catalog, os_hash_value="0" * 128)
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    rig.cache.close_image(image.record.key("stored"))
    again = rig.catalog()
    found = await again.find(image.record.id)
    with pytest.raises(ImageQuarantined):
        await found.read(0, 10)


async def test_evicted_quarantined_image_is_fetched_anew(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """Eviction, once no guest holds it, ends a quarantine; the image is fetched again and compared again."""
    expected_warnings("image quarantined")
    record = rig.glance.add(1, SIZE_BYTES)
    honest = rig.glance.contents[record.id]
    rig.glance.contents[record.id] = lambda start, stop: content(7, start, stop)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    image.opened()
    await rig.wait_written()
    await image.commit()
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    rig.glance.contents[record.id] = honest
    with pytest.raises(InUse):
        await catalog.evict(record.key("stored"))
    image.closed()
    await catalog.evict(record.key("stored"))
    again = await catalog.lookup(record.base_name)
    assert again is not None
    assert await again.read(0, 10) == content(1, 0, 10)
    await rig.wait_written()
    await again.commit()
    await rig.pass_time(mock_clock, LOOK_S)
    assert entry_of(catalog, again).verified


async def test_dropped_chunk_takes_the_proof_back(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock
) -> None:
    """[I2] What is fetched for a dropped chunk was compared with nothing: the image is compared again."""
    image = await whole(rig, catalog)
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    rig.file.drop([1])
    assert not entry_of(catalog, image).verified
    await image.read(0, SIZE_BYTES)
    await rig.wait_written()
    await image.commit()
    assert is_unproven(entry_of(catalog, image))
    await rig.pass_time(mock_clock, LOOK_S)
    assert entry_of(catalog, image).verified


async def test_image_without_a_hash_is_left_alone(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock
) -> None:
    """Where Glance states no hash, or one that cannot be computed, nothing is claimed."""
    none = await whole(rig, catalog, 1, os_hash_algo=None, os_hash_value=None)
    strange = await whole(rig, catalog, 2, os_hash_algo="sha9000")
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    for image in (none, strange):
        entry = entry_of(catalog, image)
        assert (entry.verified, entry.state) == (False, "active")


async def test_hashing_keeps_to_its_rate(rig: ImageRig, catalog: Catalog, mock_clock: MockClock) -> None:
    """`hash_rate` bounds what is hashed of all images together."""
    size_bytes = 2 * STEP_BYTES
    record = rig.glance.add(1, size_bytes)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    async for _ in image.prefetch():
        pass
    await image.commit()
    start(rig, catalog, bytes_per_s=STEP_BYTES // 5)
    await rig.pass_time(mock_clock, 8)
    assert not entry_of(catalog, image).verified
    await rig.pass_time(mock_clock, 5)
    assert entry_of(catalog, image).verified


async def test_quarantine_holds_where_the_disk_cannot_note_it(
    rig: ImageRig,
    catalog: Catalog,
    mock_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    expected_warnings: Callable[..., None],
) -> None:
    """[I1] A disk that fails costs the note, not the quarantine."""
    expected_warnings("image quarantined", "index entry was not stored", "used on and watched")
    image = await whole(rig, catalog, os_hash_value="0" * 128)

    def fail(*_: object) -> None:
        raise OSError(5, "injected")

    monkeypatch.setattr(Index, "put", fail)
    start(rig, catalog)
    await rig.pass_time(mock_clock, LOOK_S)
    with pytest.raises(ImageQuarantined):
        await image.read(0, 10)


def test_entry_of_an_earlier_version_is_unverified() -> None:
    """An index written before there was such a field is read on."""
    text = image_entry(1, SIZE_BYTES).to_json().replace(', "verified": false', "")
    assert "verified" not in text
    assert ImageEntry.from_json(text) == image_entry(1, SIZE_BYTES)
