"""Images found by name, used, evicted, gone and replaced: what the catalog keeps of each."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio
from image_fakes import ImageRig, Reply
from store_images import content
from trio.testing import wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, ImageForbidden, ImageNotFound, ImageRefused, InUse
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.index import Index

# Threads run in real time, so the clock is moved by hand.
pytestmark = pytest.mark.usefixtures("mock_clock")

SIZE_BYTES = 3 * CHUNK + 7
DOWN = GlanceUnavailable("down")


async def present(rig: ImageRig, catalog: Catalog, number: int = 1, **changes: object) -> LazyImage:
    """Return an image, uploaded, published, and all of it here."""
    record = rig.glance.add(number, SIZE_BYTES, **changes)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    await rig.wait_written()
    await image.commit()
    assert image.is_whole
    return image


def state_of(catalog: Catalog, record: ImageRecord) -> str:
    return next(entry.state for entry, _ in catalog.entries() if entry.record.id == record.id)


# ── found by people ──


async def test_image_is_found_by_a_name_that_only_it_has(rig: ImageRig, catalog: Catalog) -> None:
    """A name leads to its image; none or several with it are told apart."""
    one = rig.glance.add(1, SIZE_BYTES, name="debian")
    for number in (2, 3):
        rig.glance.add(number, SIZE_BYTES, name="twin")
    assert (await catalog.find("debian")).record == one
    with pytest.raises(ImageNotFound, match=r"'nobody': Glance has none"):
        await catalog.find("nobody")
    with pytest.raises(ImageNotFound, match=r"'twin': 2 images have that name; give an id"):
        await catalog.find("twin")


async def test_known_image_is_found_with_glance_down(rig: ImageRig, catalog: Catalog) -> None:
    """By id or by name, what is here is found without Glance; what is not is no "not found"."""
    image = await present(rig, catalog, name="debian")
    rig.glance.image_error = rig.glance.list_error = DOWN
    assert await catalog.find(image.record.id) is image
    assert await catalog.find("debian") is image
    for unknown in ("other", "00000000-0000-0000-0000-00000000000f"):
        with pytest.raises(GlanceUnavailable):
            await catalog.find(unknown)


async def test_gone_image_is_found_while_all_of_it_is_here(rig: ImageRig, catalog: Catalog) -> None:
    """[I7] What Glance no longer has is marked as gone and kept; that it is back is noticed too."""
    image = await present(rig, catalog)
    del rig.glance.records[image.record.id]
    assert await catalog.find(image.record.id) is image
    assert state_of(catalog, image.record) == "gone"
    assert image.record.key("stored") in catalog.busy_keys()
    rig.glance.records[image.record.id] = image.record
    assert await catalog.find(image.record.id) is image
    assert state_of(catalog, image.record) == "active"
    assert catalog.busy_keys() == set()


async def test_gone_image_that_is_not_whole_cannot_be_used(rig: ImageRig, catalog: Catalog) -> None:
    """An image of which bytes are missing for good is not offered for a new disk."""
    record = rig.glance.add(1, 40 * CHUNK)
    assert await catalog.lookup(record.base_name)
    rig.glance.image_error = ImageForbidden("not yours")
    with pytest.raises(ImageForbidden):
        await catalog.find(record.id)


async def test_key_is_found_by_id_or_name(rig: ImageRig, catalog: Catalog) -> None:
    """What is here is named by its id, or by a name that only it has."""
    key = (await present(rig, catalog, name="debian")).record.key("stored")
    assert catalog.key_of("debian") == catalog.key_of("00000000-0000-0000-0000-000000000001") == key
    assert catalog.key_of("other") is None
    await present(rig, catalog, 2, name="debian")
    with pytest.raises(ImageNotFound, match="2 images here have that name"):
        catalog.key_of("debian")


async def test_changed_identity_is_another_file(
    rig: ImageRig, catalog: Catalog, expected_warnings: Callable[..., None]
) -> None:
    """[I1] An id with other bytes gets another key and inode; a guest on the old one keeps its bytes."""
    expected_warnings("is changed now")
    old = await present(rig, catalog)
    old.opened()
    changed = rig.glance.add(1, SIZE_BYTES + CHUNK)
    rig.glance.contents[changed.id] = lambda start, stop: content(7, start, stop)
    new = await catalog.find(changed.id)
    assert new.inode != old.inode
    assert await new.read(0, 2 * CHUNK) == content(7, 0, 2 * CHUNK)
    assert await old.read(0, 2 * CHUNK) == content(1, 0, 2 * CHUNK)
    assert await catalog.lookup(changed.base_name) is new
    assert catalog.key_of_inode(old.inode) != catalog.key_of_inode(new.inode)


# ── use ──


async def test_listing_shows_what_was_used_here(rig: ImageRig, catalog: Catalog) -> None:
    """A lookup alone lists nothing; the first use does, gives an mtime, and both outlive the daemon."""
    image = await present(rig, catalog)
    assert catalog.names_in_use() == {}
    await catalog.used(image)
    entry = catalog.entry_of(image)
    assert entry is not None
    assert entry.mtime_ns > 0
    await catalog.used(image)
    again = rig.catalog()
    assert again.names_in_use() == {image.record.base_name: entry}
    assert again.entry_of(image) == entry


async def test_mtime_that_was_set_is_kept(rig: ImageRig, catalog: Catalog) -> None:
    """Nova's utime at each use sticks, also against a use that is noted at the same moment."""
    image = await present(rig, catalog)
    for mtime_ns in range(1, 20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(catalog.set_mtime, image, mtime_ns)
            nursery.start_soon(catalog.used, image)
        entry = catalog.entry_of(image)
        assert entry is not None
        assert (entry.mtime_ns, entry.in_use) == (mtime_ns, True)


async def test_index_that_takes_nothing_fails_no_use(
    rig: ImageRig, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I6] A disk that cannot note a use costs the guest nothing, and the note only its time."""
    expected_warnings("index entry was not stored", "used on and watched")
    image = await present(rig, catalog)
    with monkeypatch.context() as patch:
        patch.setattr(Index, "put", _fail)
        await catalog.set_mtime(image, 12_345)
        await catalog.tidy()
    assert await image.read(0, 10) == content(1, 0, 10)
    entry = catalog.entry_of(image)
    assert entry is not None
    assert (entry.mtime_ns, entry.in_use) == (12_345, True)
    assert rig.cache.index.get(entry.key) != entry
    await catalog.tidy()
    assert rig.cache.index.get(entry.key) == entry


def _fail(*_: object) -> None:
    raise OSError(errno.EIO, "injected")


# ── eviction ──


async def test_evicted_image_frees_its_bytes_and_can_come_back(rig: ImageRig, catalog: Catalog) -> None:
    """Eviction tells what it freed, forgets name and chunks, and the next lookup finds the image anew."""
    image = await present(rig, catalog)
    freed_bytes = await catalog.evict(image.record.key("stored"))
    assert freed_bytes >= SIZE_BYTES
    assert catalog.entries() == []
    assert list((rig.cache.path / "chunks").iterdir()) == []
    assert image.is_dropped
    again = await catalog.lookup(image.record.base_name)
    assert again is not None
    assert again is not image
    assert await again.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
    assert await catalog.evict("0" * 32) == 0


async def test_evicted_image_is_not_opened_before_it_is_found_again(rig: ImageRig, catalog: Catalog) -> None:
    """[I9] The inode that the kernel kept leads nowhere until a lookup has judged the image and noted it durably."""
    image = await present(rig, catalog)
    assert catalog.key_of_inode(image.inode) == image.record.key("stored")
    await catalog.evict(image.record.key("stored"))
    assert catalog.key_of_inode(image.inode) is None
    assert await catalog.lookup(image.record.base_name)
    assert catalog.key_of_inode(image.inode) == image.record.key("stored")


async def test_open_image_is_not_evicted(rig: ImageRig, catalog: Catalog) -> None:
    """[I7] An image with a handle is busy, and refused by name until the last handle is gone."""
    image = await present(rig, catalog)
    key = image.record.key("stored")
    image.opened()
    assert catalog.busy_keys() == {key}
    with pytest.raises(InUse, match=f"{image.record.id}: open by 1 handles"):
        await catalog.evict(key)
    assert not await catalog.try_evict(key)
    assert await image.read(0, 10) == content(1, 0, 10)
    image.closed()
    assert catalog.busy_keys() == set()
    assert await catalog.try_evict(key)


@pytest.mark.parametrize("error", [ImageNotFound("gone"), ImageForbidden("not yours")])
async def test_image_that_glance_no_longer_has_is_not_evicted(
    rig: ImageRig, catalog: Catalog, error: Exception
) -> None:
    """[I7] What is here of a deleted image is all there is: refused, marked, and kept from then on."""
    image = await present(rig, catalog)
    key = image.record.key("stored")
    rig.glance.image_error = error
    with pytest.raises(ImageRefused, match="kept, Glance no longer has it"):
        await catalog.evict(key)
    assert state_of(catalog, image.record) == "gone"
    assert rig.catalog().busy_keys() == {key}
    assert await image.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


async def test_glance_that_is_down_lets_nothing_be_evicted(rig: ImageRig, catalog: Catalog) -> None:
    """[I7] That Glance still has the image cannot be known, so it stays."""
    image = await present(rig, catalog)
    rig.glance.image_error = DOWN
    with pytest.raises(GlanceUnavailable):
        await catalog.evict(image.record.key("stored"))
    assert not await catalog.try_evict(image.record.key("stored"))
    assert state_of(catalog, image.record) == "active"


async def test_image_opened_while_glance_was_asked_is_not_evicted(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery
) -> None:
    """[I7] What decides is whether it is open when it goes, not when the eviction was begun."""
    image = await present(rig, catalog)
    rig.glance.image_gate = gate = trio.Event()
    evicted: list[bool] = []

    async def evict() -> None:
        evicted.append(await catalog.try_evict(image.record.key("stored")))

    nursery.start_soon(evict)
    await wait_all_tasks_blocked()
    image.opened()
    gate.set()
    await wait_all_tasks_blocked()
    assert evicted == [False]
    assert not image.is_dropped


async def test_replaced_daemon_keeps_what_is_open(rig: ImageRig, catalog: Catalog) -> None:
    """[I7] The last daemon's handles are counted by the next: what is open stays until the last is released."""
    used, unused = await present(rig, catalog, 1), await present(rig, catalog, 2)
    for image in (used, unused):
        await catalog.used(image)
        rig.cache.close_image(image.record.key("stored"))
    key = used.record.key("stored")
    resumed = rig.catalog(handles={used.inode: 2, 77: 1})
    assert resumed.busy_keys() == {key}
    with pytest.raises(InUse, match="open by 2 handles"):
        await resumed.evict(key)
    assert await resumed.try_evict(unused.record.key("stored"))
    again = await resumed.image_of(key)
    again.closed()
    with pytest.raises(InUse, match="open by 1 handles"):
        await resumed.evict(key)
    again.closed()
    assert await resumed.try_evict(key)


async def test_image_being_fetched_is_busy(rig: ImageRig, catalog: Catalog, nursery: trio.Nursery) -> None:
    """[I7] Making room does not take an image under the hands of who is fetching it."""
    record = rig.glance.add(1, 40 * CHUNK)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    await rig.wait_written()
    rig.glance.replies.append(Reply(gate=trio.Event()))
    nursery.start_soon(image.read, 30 * CHUNK, 10)
    await wait_all_tasks_blocked()
    assert catalog.busy_keys() == {record.key("stored")}


async def test_eviction_that_the_disk_refuses_is_no_fault_of_the_mounts(
    rig: ImageRig, catalog: Catalog, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I6] A cache disk that cannot forget leaves the image as it was found: not dropped, no exception."""
    expected_warnings("not dropped", "used on and watched")
    image = await present(rig, catalog)
    monkeypatch.setattr(Index, "forget", _fail)
    assert not await catalog.try_evict(image.record.key("stored"))
    monkeypatch.undo()
    again = await catalog.lookup(image.record.base_name)
    assert again is not None
    assert await again.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
