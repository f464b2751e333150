"""A decoded image is compared with its source, which comes once more, in the background."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import trio
from image_fakes import ImageRig, Reply
from qcow2_writer import Geometry, write_image
from rawview_rig import lie, open_raw
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.pace import Pace
from lazyimg.errors import GlanceUnavailable
from lazyimg.image.lazyimage import LazyImage, SourceHash
from lazyimg.image.sourcecheck import (
    AGAIN_S,
    ATTEMPT_PAUSE_S,
    ATTEMPTS_MAX,
    LOOK_INTERVAL_S,
    Source,
    SourceCheck,
)
from lazyimg.store.entry import ImageEntry

IMAGE = write_image(
    Geometry(3, 12, 6 * CHUNK),
    {**dict.fromkeys(range(0, 30), "data"), **dict.fromkeys(range(40, 70), "compressed")},
    seed=5,
)
LOOK_S = int(LOOK_INTERVAL_S) + 2


class Images:
    """One image, and what was found of it."""

    def __init__(self, rig: ImageRig, image: LazyImage) -> None:
        self.rig = rig
        self.image = image
        self.outcomes: list[SourceHash] = []

    def open_images(self) -> list[LazyImage]:
        return [self.image]

    def entries(self) -> list[tuple[ImageEntry, LazyImage | None]]:
        entry = self.rig.cache.index.get(self.image.record.key("raw"))
        assert entry is not None
        return [(replace(entry, in_use=True), self.image)] if "match" not in self.outcomes else []

    async def image_of(self, key: str) -> LazyImage:
        await trio.lowlevel.checkpoint()
        return self.image

    async def hashed(self, image: LazyImage, outcome: SourceHash) -> None:
        await trio.lowlevel.checkpoint()
        self.outcomes.append(outcome)

    def start(self, *, may_fetch: bool = True) -> None:
        source = Source(self.rig.glance, self.rig.slots, Pace(0)) if may_fetch else None
        check = SourceCheck(self, self.rig.disk, self.rig.hash_limiter, source, bytes_per_s=0)
        self.rig.nursery.start_soon(check.run)


async def whole(rig: ImageRig) -> Images:
    image = await open_raw(rig, 1, IMAGE.source)
    assert await image.read(0, image.size_bytes) == IMAGE.read(0, 6 * CHUNK)
    await rig.wait_written()
    await rig.settle()
    await image.commit()
    assert image.is_whole
    rig.glance.ranges.clear()
    rig.glance.sent_bytes = 0
    return Images(rig, image)


async def test_zeros_are_on_file_when_hydration_goes_on(rig: ImageRig) -> None:
    """A step of hydration that brings nothing but zeros has brought something when it ends."""
    image = await open_raw(rig, 1, write_image(Geometry(3, 16, 40 * CHUNK), {39: "data"}, seed=1).source)
    await image.hydrate(8 * CHUNK)
    assert image.present_bytes == 8 * CHUNK
    assert await image.read(0, 8 * CHUNK) == bytes(8 * CHUNK)


async def test_source_comes_once_and_matches(rig: ImageRig, mock_clock: MockClock) -> None:
    """Each byte of the source is asked for once, in order, in a background slot."""
    images = await whole(rig)
    images.start()
    await rig.pass_time(mock_clock, LOOK_S)
    assert images.outcomes == ["match"]
    assert rig.glance.ranges == [(0, len(IMAGE.source))]


async def test_nothing_is_fetched_where_hydration_is_off(rig: ImageRig, mock_clock: MockClock) -> None:
    """Without leave to fetch for nobody a decoded image stays unchecked."""
    images = await whole(rig)
    images.start(may_fetch=False)
    await rig.pass_time(mock_clock, LOOK_S)
    assert (images.outcomes, rig.glance.ranges) == ([], [])


async def test_nothing_is_fetched_while_a_guest_waits(rig: ImageRig, mock_clock: MockClock) -> None:
    """[I4] The pass begins nothing while anybody waits for bytes."""
    images = await whole(rig)
    images.image.last_wanted_s = float("inf")
    images.start()
    await rig.pass_time(mock_clock, LOOK_S)
    assert rig.glance.ranges == []
    images.image.last_wanted_s = trio.current_time() - 2
    await rig.pass_time(mock_clock, LOOK_S)
    assert images.outcomes == ["match"]


async def test_wrong_stored_bytes_are_a_mismatch(
    rig: ImageRig, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I1] A chunk that is not what the proven source decodes to makes the image one to quarantine."""
    expected_warnings("not what its source decodes to: bytes .*other bytes in the source")
    images = await whole(rig)
    file = images.image._file
    file.drop([0])
    file.write(0, [bytes(CHUNK)])
    file.commit()
    images.start()
    await rig.pass_time(mock_clock, LOOK_S)
    assert images.outcomes == ["mismatch"]


async def test_lie_of_the_network_is_no_mismatch(
    rig: ImageRig, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """A source that comes other than its hash and than what is stored says nothing; it is asked for again later."""
    expected_warnings("not of the hash that it states")
    images = await whole(rig)
    lie(rig, {len(IMAGE.source) - 100: b"lie"}, 1)
    images.start()
    await rig.pass_time(mock_clock, LOOK_S)
    assert images.outcomes == ["unknown"]
    mock_clock.jump(AGAIN_S)
    await rig.pass_time(mock_clock, LOOK_S)
    assert images.outcomes == ["unknown", "match"]


async def test_outage_leaves_it_unchecked(rig: ImageRig, mock_clock: MockClock) -> None:
    """A Glance that does not answer is asked a few times, and again much later."""
    images = await whole(rig)
    rig.glance.always = Reply(error=GlanceUnavailable("down"))
    images.start()
    await rig.pass_time(mock_clock, int(ATTEMPTS_MAX * ATTEMPT_PAUSE_S) + LOOK_S)
    assert (len(rig.glance.ranges), images.outcomes) == (ATTEMPTS_MAX, [])
    rig.glance.always = Reply()
    mock_clock.jump(AGAIN_S)
    await rig.pass_time(mock_clock, LOOK_S)
    assert images.outcomes == ["match"]
