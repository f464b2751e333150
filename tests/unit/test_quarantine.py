"""A quarantine is in force from the moment it is found out, whatever the disk does with the note of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from image_fakes import ImageRig
from store_images import content

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ImageQuarantined
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.index import Index

SIZE_BYTES = 3 * CHUNK + 7


def fail(*_: object) -> None:
    raise OSError(28, "injected")


async def wrong(rig: ImageRig, catalog: Catalog) -> LazyImage:
    """Return an image all of which is here, durably, and is of another hash than Glance's."""
    image = await catalog.find(rig.glance.add(1, SIZE_BYTES, os_hash_value="0" * 128).id)
    await rig.wait_written()
    await image.commit()
    return image


async def test_quarantine_that_is_not_noted_outlives_the_opening(
    rig: ImageRig,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    expected_warnings: Callable[..., None],
) -> None:
    """[I1] Closed and opened again no byte of it is served; it is not evicted for room, and noted when the disk can."""
    expected_warnings("image quarantined", "index entry was not stored")
    image = await wrong(rig, catalog)
    key = image.record.key("stored")
    with monkeypatch.context() as patch:
        patch.setattr(Index, "put", fail)
        await catalog.hashed(image, "mismatch")
        catalog._opened.close(key)
        again = await catalog.image_of(key)
        assert again is not image
        with pytest.raises(ImageQuarantined):
            await again.read(0, 10)
        await catalog.tidy()
    assert key in catalog.busy_keys()
    await catalog.tidy()
    stored = rig.cache.index.get(key)
    assert stored is not None
    assert (stored.state, stored.verified) == ("quarantined", False)


async def test_evicted_half_it_does_not_come_back(
    rig: ImageRig,
    catalog: Catalog,
    monkeypatch: pytest.MonkeyPatch,
    expected_warnings: Callable[..., None],
) -> None:
    """[I1] Where the disk fails its eviction, what is here goes before the image is shown again."""
    expected_warnings("image quarantined")
    image = await wrong(rig, catalog)
    key = image.record.key("stored")
    await catalog.hashed(image, "mismatch")
    with monkeypatch.context() as patch:
        patch.setattr(CacheDir, "remove_image", fail)
        with pytest.raises(OSError, match="injected"):
            await catalog.evict(key)
        with pytest.raises(OSError, match="injected"):
            await catalog.find(image.record.id)
    before = rig.glance.sent_bytes
    found = await catalog.find(image.record.id)
    assert await found.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
    assert rig.glance.sent_bytes - before == SIZE_BYTES
