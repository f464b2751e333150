"""Images that Glance deleted, deactivated or replaced: what their guests read, what is kept, what is shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from image_fakes import ImageRig, Reply
from store_images import content
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, ImageChanged, ImageForbidden, ImageNotFound, ImageRefused
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.recordwatch import FIRST_S, INTERVAL_S, INTERVAL_TROUBLE_S, SINGLE_MAX, RecordWatch

# Threads run in real time, so the clock is moved by hand.
pytestmark = pytest.mark.usefixtures("mock_clock")

# The first MiB comes with the lookup; the rest of an image is absent.
SIZE_BYTES = 40 * CHUNK
ABSENT = 30 * CHUNK
MD5 = "0" * 32
OTHER_MD5 = "f" * 32


@pytest.fixture
def watch(rig: ImageRig) -> RecordWatch:
    return RecordWatch(rig.glance)


async def held(rig: ImageRig, catalog: Catalog, number: int = 1, **changes: object) -> LazyImage:
    """Return an image that a guest holds open, little of it here."""
    record = rig.glance.add(number, SIZE_BYTES, checksum=MD5, **changes)
    image = await catalog.lookup(record.base_name)
    assert image is not None
    await rig.wait_written()
    image.opened()
    await catalog.used(image)
    return image


def replace_content(rig: ImageRig, record: ImageRecord, **changes: object) -> ImageRecord:
    """Have Glance give the image's id to other content of the same size."""
    other = replace(record, os_hash_value="1" * 128, checksum=OTHER_MD5)
    other = replace(other, **changes)  # type: ignore[arg-type]  # any field
    rig.glance.records[record.id] = other
    rig.glance.contents[record.id] = lambda start, stop: content(77, start, stop)
    return other


def state_of(catalog: Catalog, image: LazyImage) -> str:
    return next(entry.state for entry, open_image in catalog.entries() if open_image is image)


# ── other content under the same id ──


async def test_body_of_other_content_is_never_taken(rig: ImageRig, catalog: Catalog) -> None:
    """[I1] A Glance rebuilt with the same id is found out by its answer's own headers, before a byte counts."""
    image = await held(rig, catalog)
    present = image.present_bytes
    replace_content(rig, image.record)
    with pytest.raises(ImageChanged, match="other content under this id"):
        await image.read(ABSENT, 10)
    assert rig.news_count > 0
    assert image.present_bytes == present
    assert await image.read(0, CHUNK) == content(1, 0, CHUNK)


async def test_lying_header_is_no_change(rig: ImageRig, catalog: Catalog, mock_clock: MockClock) -> None:
    """[I1] Bytes called another image's are not taken, and the reader waits while the record is what it was."""
    image = await held(rig, catalog)
    honest = rig.glance.records[image.record.id]
    rig.glance.records[image.record.id] = replace(honest, checksum=OTHER_MD5)
    async with trio.open_nursery() as nursery:
        got: list[bytes] = []

        async def read() -> None:
            got.append(await image.read(ABSENT, 10))

        nursery.start_soon(read)
        await rig.settle()
        assert got == []
        rig.glance.records[image.record.id] = honest
        await rig.pass_time(mock_clock, 6)
    assert got == [content(1, ABSENT, ABSENT + 10)]


async def test_changed_image_is_two(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Once the change is known the name leads to what Glance has, and the old is never asked for again."""
    expected_warnings("is changed now")
    old = await held(rig, catalog)
    other = replace_content(rig, old.record, checksum=None)
    await watch.look(catalog)
    asked = len(rig.glance.ranges)
    with pytest.raises(ImageChanged):
        await old.read(ABSENT, 10)
    assert len(rig.glance.ranges) == asked
    assert await old.read(0, 10) == content(1, 0, 10)
    new = await catalog.lookup(other.base_name)
    assert new is not None
    assert new.inode != old.inode
    assert await new.read(ABSENT, 10) == content(77, ABSENT, ABSENT + 10)
    assert (state_of(catalog, old), state_of(catalog, new)) == ("changed", "active")
    assert catalog.names_in_use() == {}


async def test_changed_image_goes_with_its_last_handle(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, expected_warnings: Callable[..., None]
) -> None:
    """[I7] The old content stays as long as a guest has it open, also through a restart, and no longer."""
    expected_warnings("is changed now")
    old = await held(rig, catalog)
    replace_content(rig, old.record)
    await watch.look(catalog)
    assert not await catalog.try_evict(old.record.key("stored"))
    old.closed()
    await catalog.released(old)
    await rig.settle()
    assert catalog.key_of_inode(old.inode) is None
    assert rig.cache.index.get(old.record.key("stored")) is None


async def test_changed_image_is_known_to_the_next_daemon(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, expected_warnings: Callable[..., None]
) -> None:
    """[I1] After a restart the old inode still reads the old bytes or fails; its name is not the old one's."""
    expected_warnings("is changed now")
    old = await held(rig, catalog)
    replace_content(rig, old.record)
    await watch.look(catalog)
    await old.commit()
    key = old.record.key("stored")
    rig.cache.close_image(key)
    again = rig.catalog(handles={old.inode: 1})
    assert not again.is_published(old.record.base_name)
    assert again.key_of_inode(old.inode) == key
    image = await again.image_of(key)
    assert await image.read(0, 10) == content(1, 0, 10)
    with pytest.raises(ImageChanged):
        await image.read(ABSENT, 10)


@pytest.mark.parametrize("status", ["queued", "saving", "importing"])
async def test_record_in_the_making_says_nothing(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, status: str
) -> None:
    """A record without content is not one of other content: its readers wait."""
    image = await held(rig, catalog)
    rig.glance.records[image.record.id] = replace(image.record, status=status, size_bytes=None, checksum=None)
    await watch.look(catalog)
    assert state_of(catalog, image) == "active"


# ── gone ──


@pytest.mark.parametrize("error", [ImageNotFound("deleted"), ImageForbidden("not yours")])
async def test_deleted_image_is_read_as_far_as_it_is_here(
    rig: ImageRig,
    catalog: Catalog,
    watch: RecordWatch,
    error: Exception,
    expected_warnings: Callable[..., None],
) -> None:
    """[I7] What is here is read on and kept, what is absent fails at once with the reason, and both end with it."""
    expected_warnings("is gone now, it was active", required=True)
    image = await held(rig, catalog)
    rig.glance.image_error = error
    await watch.look(catalog)
    assert state_of(catalog, image) == "gone"
    assert await image.read(0, CHUNK) == content(1, 0, CHUNK)
    asked = len(rig.glance.ranges)
    with pytest.raises(ImageNotFound, match="what is here of it is kept and read on"):
        await image.read(ABSENT, 10)
    assert len(rig.glance.ranges) == asked
    image.closed()
    assert image.record.key("stored") in catalog.busy_keys()
    with pytest.raises(ImageRefused, match="kept, Glance no longer has it"):
        await catalog.evict(image.record.key("stored"))
    rig.glance.image_error = None
    await watch.look(catalog)
    assert state_of(catalog, image) == "active"
    assert await image.read(ABSENT, 10) == content(1, ABSENT, ABSENT + 10)


async def test_reader_that_waits_is_told(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, expected_warnings: Callable[..., None]
) -> None:
    """A read that waits for a flight when the image is found gone ends with the reason, not at its limit."""
    expected_warnings("is gone now")
    image = await held(rig, catalog)
    rig.glance.replies.append(Reply(gate=trio.Event()))
    errors: list[Exception] = []

    async def read() -> None:
        try:
            await image.read(ABSENT, 10)
        except ImageNotFound as exc:
            errors.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await rig.settle()
        del rig.glance.records[image.record.id]
        await watch.look(catalog)
    assert len(errors) == 1


# ── deactivated ──


async def test_deactivated_image_is_waited_for(
    rig: ImageRig,
    catalog: Catalog,
    watch: RecordWatch,
    mock_clock: MockClock,
    expected_warnings: Callable[..., None],
) -> None:
    """While Glance refuses an image's bytes its readers wait, its state is shown, and reactivation serves them."""
    expected_warnings("is deactivated now", "trying again")
    image = await held(rig, catalog)
    active = rig.glance.records[image.record.id]
    rig.glance.records[active.id] = replace(active, status="deactivated")
    rig.glance.always = Reply(error=ImageForbidden("deactivated"))
    got: list[bytes] = []

    async def read() -> None:
        got.append(await image.read(ABSENT, 10))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await rig.pass_time(mock_clock, 10)
        assert rig.news_count > 0
        await watch.look(catalog)
        assert (state_of(catalog, image), got) == ("deactivated", [])
        assert image.record.key("stored") in catalog.busy_keys()
        rig.glance.records[active.id] = active
        rig.glance.always = Reply()
        await rig.pass_time(mock_clock, 6)
        await watch.look(catalog)
    assert got == [content(1, ABSENT, ABSENT + 10)]
    assert state_of(catalog, image) == "active"


# ── the watch ──


async def test_nothing_in_use_costs_nothing(rig: ImageRig, catalog: Catalog, watch: RecordWatch) -> None:
    """An image that nobody uses here is not asked for."""
    image = await catalog.lookup(rig.glance.add(1, SIZE_BYTES).base_name)
    assert image is not None
    rig.glance.image_calls.clear()
    rig.glance.list_calls = 0
    await watch.look(catalog)
    assert (rig.glance.image_calls, rig.glance.list_calls) == ([], 0)


async def test_many_images_cost_one_list(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, expected_warnings: Callable[..., None]
) -> None:
    """[I5] Above a few images the list is asked, and only what it says has changed is looked at by itself."""
    expected_warnings("is gone now")
    images = [await held(rig, catalog, number) for number in range(1, SINGLE_MAX + 2)]
    rig.glance.image_calls.clear()
    rig.glance.list_calls = 0
    del rig.glance.records[images[0].record.id]
    await watch.look(catalog)
    assert (rig.glance.image_calls, rig.glance.list_calls) == ([images[0].record.id], 1)
    assert state_of(catalog, images[0]) == "gone"


async def test_list_that_leaves_one_out_is_not_believed(
    rig: ImageRig, catalog: Catalog, watch: RecordWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image missing in the list alone is not gone: its record decides."""
    images = [await held(rig, catalog, number) for number in range(1, SINGLE_MAX + 2)]

    async def nothing() -> list[ImageRecord]:
        return []

    monkeypatch.setattr(rig.glance, "list_images", nothing)
    await watch.look(catalog)
    assert {state_of(catalog, image) for image in images} == {"active"}


async def test_outage_changes_no_state(rig: ImageRig, catalog: Catalog, watch: RecordWatch) -> None:
    """A Glance that does not answer says nothing of its images."""
    image = await held(rig, catalog)
    rig.glance.image_error = GlanceUnavailable("down")
    await watch.look(catalog)
    assert state_of(catalog, image) == "active"


async def test_name_and_properties_follow_glance(rig: ImageRig, catalog: Catalog, watch: RecordWatch) -> None:
    """What may change of a record does, durably and in the open image, under the same key."""
    image = await held(rig, catalog)
    changed = replace(image.record, name="other", properties={"lazyimg_hydrate": "false"})
    rig.glance.records[changed.id] = changed
    await watch.look(catalog)
    assert image.record == changed
    assert rig.cache.index.get(changed.key("stored")).record == changed  # type: ignore[union-attr]  # it is there


async def test_watch_looks_now_and_then_and_when_woken(
    rig: ImageRig,
    catalog: Catalog,
    watch: RecordWatch,
    mock_clock: MockClock,
    expected_warnings: Callable[..., None],
) -> None:
    """Records are asked for every few minutes, sooner while an image stands badly, and at once when there is news."""
    expected_warnings("is gone now")
    image = await held(rig, catalog)
    rig.nursery.start_soon(watch.run, catalog)
    await rig.pass_time(mock_clock, int(FIRST_S) + 1)
    rig.glance.image_calls.clear()
    await rig.pass_time(mock_clock, int(INTERVAL_S * 0.7))
    assert rig.glance.image_calls == []
    watch.wake()
    await rig.pass_time(mock_clock, 1)
    assert len(rig.glance.image_calls) == 1
    record = rig.glance.records.pop(image.record.id)
    watch.wake()
    await rig.pass_time(mock_clock, 2)
    assert state_of(catalog, image) == "gone"
    rig.glance.records[record.id] = record
    await rig.pass_time(mock_clock, int(INTERVAL_TROUBLE_S * 1.3) + 2)
    assert state_of(catalog, image) == "active"
