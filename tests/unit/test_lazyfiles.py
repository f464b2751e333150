"""Lazy images as files: what is answered from memory, whatever the cache and its disk do meanwhile."""

from __future__ import annotations

import os

from image_fakes import ImageRig
from trio.testing import wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.lazyfiles import LazyFiles
from lazyimg.image.catalog import Catalog


def files_of(catalog: Catalog) -> LazyFiles:
    return LazyFiles(catalog, 0o644, lambda: (42, 42), Handles(make_table()), mtime_shift_ns=lambda _: 0)


async def test_listing_outlives_a_dropped_image(rig: ImageRig, catalog: Catalog) -> None:
    """[I6] An image that is dropped between a listing's beginning and its answer is listed as it was."""
    record = rig.glance.add(1, 20 * CHUNK)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    await catalog.used(image)
    files = files_of(catalog)
    ((name, entry),) = files.listed().items()
    assert os.fsdecode(name) == record.base_name
    await rig.wait_written()
    await catalog.evict(entry.key)
    await wait_all_tasks_blocked()
    assert not files.listed()
    attributes = files.listed_attributes(entry)
    assert (attributes.st_ino, attributes.st_size, attributes.st_uid) == (image.inode, 20 * CHUNK, 42)


async def test_listing_opens_no_chunk_file(rig: ImageRig, catalog: Catalog) -> None:
    """A listing shows what is present of images that nobody has open, and opens none of them."""
    record = rig.glance.add(1, 20 * CHUNK)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    await catalog.used(image)
    await rig.wait_written()
    present_bytes = image.present_bytes
    await image.commit()
    again = rig.catalog()
    files = files_of(again)
    (entry,) = files.listed().values()
    attributes = files.listed_attributes(entry)
    assert attributes.st_blocks * 512 == present_bytes > 0
    assert again.open_images() == []
