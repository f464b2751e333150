"""A qcow2 whose store serves no ranges: decoded from one stream that is kept, and in nobody's way meanwhile."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import trio
from image_fakes import ImageRig, Reader, Reply, wait_until
from qcow2_writer import Geometry, Image, write_image
from rawview_rig import broken, lie, open_again, open_raw

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ReadTimeout, WholeBody
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.slots import FlightSlots
from lazyimg.image.spool import Spool, SpoolSlots

# Threads and hashes of a source of some MB.
pytestmark = pytest.mark.slow

CHUNKS = 40


@pytest.fixture
def rig(rig: ImageRig) -> ImageRig:
    """The image layer over a store that serves no ranges."""
    rig.glance.has_ranges = False
    return rig


@pytest.fixture(scope="module")
def image() -> Image:
    """2.5 MiB of data and compressed clusters, in no order, tables among them."""
    guest = {index: "compressed" if index % 3 else "data" for index in range(CHUNKS)}
    return write_image(Geometry(3, 16, CHUNKS * CHUNK), guest, seed=3)  # type: ignore[arg-type]


async def assert_reads_right(opened: LazyImage, image: Image) -> None:
    assert await opened.read(0, CHUNKS * CHUNK) == image.read(0, CHUNKS * CHUNK)


async def test_source_without_ranges_is_decoded_from_one_stream(rig: ImageRig, image: Image) -> None:
    """[I1] Each byte is right whatever order it is read in, the source is sent once, and status says stream."""
    opened = await open_raw(rig, 1, image.source)
    assert opened.source == "ranges"
    for chunk in (CHUNKS - 1, 0, CHUNKS // 2):
        assert await opened.read(chunk * CHUNK, 10) == image.read(chunk * CHUNK, chunk * CHUNK + 10)
    await assert_reads_right(opened, image)
    assert opened.source == "stream"
    assert rig.glance.streams == 1
    assert rig.glance.sent_bytes == len(image.source)


async def test_three_whole_bodies_make_a_stream(rig: ImageRig, image: Image) -> None:
    """A server that answers ranges with the whole image is believed the third time, not before."""
    rig.glance.has_ranges = True
    opened = await open_raw(rig, 1, image.source)
    for expected in ("ranges", "ranges", "stream"):
        rig.glance.replies.append(Reply(error=WholeBody("all of it")))
        try:
            async with spool_of(opened).open_range(
                opened.record.id, 0, 10, size_bytes=len(image.source)
            ) as body:
                assert b"".join([data async for data in body]) == image.source[:10]
        except WholeBody:
            assert expected == "ranges"
        assert opened.source == expected
    await assert_reads_right(opened, image)


async def test_stream_that_breaks_goes_on(
    rig: ImageRig, image: Image, expected_warnings: Callable[..., None]
) -> None:
    """A stream that breaks is begun again; what came before is not written twice, and no byte is wrong."""
    expected_warnings("trying again", required=False)
    rig.glance.replies.extend([broken(400_000), broken(300_000), broken(900_001)])
    opened = await open_raw(rig, 1, image.source)
    await assert_reads_right(opened, image)
    assert rig.glance.streams == 4


async def test_readers_of_a_slow_stream_take_no_slot_from_others(
    rig: ImageRig, image: Image, nursery: trio.Nursery
) -> None:
    """[I6] However many reads wait for the stream, other images' flights start; each part is read as it comes."""
    held_at = len(image.source) - 150_000
    held = Reply(hold_at_bytes=held_at)
    rig.glance.replies.append(held)
    opened = await open_raw(rig, 1, image.source)
    readers = [Reader(nursery, opened.fetcher, chunk) for chunk in range(CHUNKS)]
    await wait_until(lambda: any(reader.ended_at for reader in readers))
    await wait_until(lambda: rig.glance.sent_bytes >= held_at)
    assert not all(reader.ended_at for reader in readers)
    assert opened.waits_for(0, CHUNKS * CHUNK) == "stream"
    taken = [rig.slots.take_nowait(urgent=True, when_free=lambda: None) for _ in range(4)]
    assert sum(taken) == 3, "all but the stream's own"
    for _ in range(3):
        rig.slots.give_back(urgent=True)
    held.resume.set()
    await wait_until(lambda: all(reader.ended_at for reader in readers))
    for chunk, reader in enumerate(readers):
        assert reader.got == {chunk: image.read(chunk * CHUNK, (chunk + 1) * CHUNK)}
    await wait_until(lambda: opened.fetcher.is_idle)
    assert sum(rig.slots.take_nowait(urgent=True, when_free=lambda: None) for _ in range(5)) == 4


async def test_spool_counts_and_goes_when_all_is_here(rig: ImageRig, image: Image) -> None:
    """[I5] The source's room is the image's until it is whole, or dropped."""
    key_of = lambda opened: opened.record.key("raw")  # noqa: E731
    opened = await open_raw(rig, 1, image.source)
    await opened.read((CHUNKS - 1) * CHUNK, 10)
    chunks_bytes = CHUNKS * CHUNK
    await wait_until(lambda: rig.cache.allocated_bytes(key_of(opened)) >= len(image.source))
    await assert_reads_right(opened, image)
    await opened.fetcher.wait_written()
    assert rig.cache.allocated_bytes(key_of(opened)) > chunks_bytes
    assert opened.is_whole
    await opened.commit()
    assert rig.cache.allocated_bytes(key_of(opened)) <= chunks_bytes + 8192
    assert rig.fake_space.taken_bytes == 0


async def test_no_room_for_the_source_is_an_error_not_zeros(
    rig: ImageRig, image: Image, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Where the source cannot be kept, reads end with an error that says so, and go well once there is room."""
    expected_warnings("trying again", required=False)
    rig.read_timeout_s = 0.1
    rig.fake_space.has_room = False
    opened = await open_raw(rig, 1, image.source)
    with pytest.raises(ReadTimeout, match="no room for its source"):
        await opened.read(0, 10)
    rig.fake_space.has_room = True
    rig.read_timeout_s = 20
    with trio.fail_after(20):
        while True:
            try:
                assert await opened.read(0, 10) == image.read(0, 10)
                break
            except ReadTimeout:
                continue


async def test_whole_bodies_make_no_stream_that_cannot_be_decoded(
    rig: ImageRig, image: Image, expected_warnings: Callable[..., None]
) -> None:
    """However many whole bodies come, a qcow2 is decoded from its ranges or its spool, and each byte is right."""
    expected_warnings("trying again", required=False)
    rig.glance.has_ranges = True
    opened = await open_raw(rig, 1, image.source)
    await opened.read(0, 10)
    rig.glance.replies.extend(Reply(error=WholeBody("all of it")) for _ in range(4))
    await assert_reads_right(opened, image)
    assert (opened.source, rig.glance.streams) == ("ranges", 0), "a good range came before"
    again = await open_again(rig, opened.record)
    rig.glance.replies.extend(Reply(error=WholeBody("all of it")) for _ in range(3))
    rig.cache.open_image(opened.record.key("raw")).drop(list(range(CHUNKS)))
    await assert_reads_right(again, image)
    assert (again.source, again.fetcher.source, rig.glance.streams) == ("stream", "ranges", 1)


async def test_source_of_another_hash_is_given_up(
    rig: ImageRig, image: Image, expected_warnings: Callable[..., None]
) -> None:
    """[I1] A stream that is not of the image's hash is not read to its end; the next one is, if that is."""
    expected_warnings("not of the hash", "trying again", required=False)
    source = write_image(Geometry(3, 16, CHUNKS * CHUNK), dict.fromkeys(range(CHUNKS), "data"), seed=4)
    opened = await open_raw(rig, 1, source.source)
    lie(rig, {len(source.source) - 10: bytes(10)}, times=1)
    for chunk in reversed(range(CHUNKS)):
        at = chunk * CHUNK
        assert await opened.read(at, CHUNK) == source.read(at, at + CHUNK)
    assert rig.glance.streams == 2


async def test_spool_that_the_disk_lost_is_streamed_again(
    rig: ImageRig, image: Image, expected_warnings: Callable[..., None]
) -> None:
    """[I1] What the disk gives back otherwise than it was written is no source; another file is filled."""
    expected_warnings("trying again", "used on and watched", required=False)
    opened = await open_raw(rig, 1, image.source)
    await opened.read((CHUNKS - 1) * CHUNK, 10)
    await wait_until(lambda: spool_of(opened)._filled_bytes == len(image.source))
    file = spool_of(opened)._file
    assert file is not None
    os.pwrite(file._fd, bytes(len(image.source)), 0)
    await assert_reads_right(opened, image)
    assert file.is_closed
    assert rig.glance.streams == 2


async def test_spool_goes_with_its_image(rig: ImageRig, image: Image) -> None:
    """[I5] An image that is dropped ends its stream, and its spool takes no room any more."""
    rig.glance.replies.append(Reply(hold_at_bytes=len(image.source) - 150_000))
    opened = await open_raw(rig, 1, image.source)
    await opened.read(0, 10)
    file = spool_of(opened)._file
    assert file is not None
    opened.drop()
    await wait_until(lambda: file.is_closed)
    assert file.allocated_bytes() == 0
    await wait_until(lambda: rig.slots.take_nowait(urgent=True, when_free=lambda: None))


async def test_hydration_makes_it_whole_of_one_stream(rig: ImageRig, image: Image) -> None:
    """Hydrated part by part, in the background, the source is sent once; what is here by then is right."""
    opened = await open_raw(rig, 1, image.source)
    with trio.fail_after(20):
        while not opened.is_whole:
            await opened.hydrate(4 * CHUNK)
    assert rig.glance.streams == 1
    rig.glance.has_ranges, before = True, rig.glance.sent_bytes
    await assert_reads_right(opened, image)
    assert rig.glance.sent_bytes == before == len(image.source)


def spool_of(image: LazyImage) -> Spool:
    spool = image._spool
    assert spool is not None
    return spool


def test_flights_out_are_given_back_once() -> None:
    """Flights that were out when the spool began are counted where they went, and no slot is lost or made."""
    shared = FlightSlots(8, 4)
    slots = SpoolSlots(shared)
    for urgent in (True, True, False):
        assert slots.take_nowait(urgent=urgent, when_free=lambda: None)
    slots.leave()
    assert slots.take_nowait(urgent=False, when_free=lambda: None)
    for urgent in (True, True, False, False):
        slots.give_back(urgent=urgent)
    taken = sum(shared.take_nowait(urgent=True, when_free=lambda: None, for_lookup=True) for _ in range(9))
    assert taken == 8
