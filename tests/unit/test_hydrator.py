"""The rest of images in use comes in the background, and never in anybody's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from image_fakes import ImageRig, Reply
from store_images import content
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.pace import Pace
from lazyimg.errors import GlanceUnavailable, ImageNotFound
from lazyimg.image.hydrator import LOOK_INTERVAL_S, SET_ASIDE_S, STEP_LIMIT_S, Hydrator
from lazyimg.image.lazyimage import LazyImage

DELAY_S = 30
SIZE_BYTES = 20 * CHUNK + 7
DOWN = Reply(error=GlanceUnavailable("down"))


class Held:
    """The images that are open, and whether there is room: as the test says."""

    def __init__(self) -> None:
        self.images: list[LazyImage] = []
        self.is_full = False

    def open_images(self) -> list[LazyImage]:
        return self.images

    async def held_images(self) -> list[LazyImage]:
        await trio.lowlevel.checkpoint()
        return [image for image in self.images if image.open_handles]


@pytest.fixture
def held() -> Held:
    return Held()


def start(rig: ImageRig, held: Held, *, bytes_per_s: int = 0) -> None:
    rig.nursery.start_soon(Hydrator(held, held, rig.disk, Pace(bytes_per_s), delay_s=DELAY_S).run)


def opened(rig: ImageRig, held: Held, number: int = 1, size_bytes: int = SIZE_BYTES) -> LazyImage:
    image = rig.add(number, size_bytes)
    image.opened()
    held.images.append(image)
    return image


async def test_open_image_becomes_whole(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """An image in use is fetched to its end, durably, each byte once, and then nothing more."""
    image = opened(rig, held)
    start(rig, held)
    await rig.pass_time(mock_clock, DELAY_S + 2)
    assert (image.is_whole, image.is_dirty, image.missing_bytes) == (True, False, 0)
    assert sorted(rig.glance.ranges)[-1][1] == SIZE_BYTES
    assert rig.glance.sent_bytes == SIZE_BYTES
    await rig.pass_time(mock_clock, DELAY_S)
    assert rig.glance.sent_bytes == SIZE_BYTES
    assert await image.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


async def test_nothing_comes_before_the_delay(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """The delay begins anew with each urgent want: a guest that boots shares its network with nothing."""
    image = opened(rig, held)
    start(rig, held)
    await rig.pass_time(mock_clock, DELAY_S - 1)
    assert rig.glance.ranges == []
    await image.read(0, 10)
    asked = len(rig.glance.ranges)
    await rig.pass_time(mock_clock, DELAY_S - 1)
    assert len(rig.glance.ranges) == asked
    await rig.pass_time(mock_clock, 3)
    assert image.is_whole


async def test_nothing_begins_while_another_image_is_wanted(
    rig: ImageRig, held: Held, mock_clock: MockClock
) -> None:
    """[I4] A want of one image holds up what is fetched of another for nobody."""
    image, other = opened(rig, held), opened(rig, held, 2)
    other.last_wanted_s = float("inf")
    start(rig, held)
    await rig.pass_time(mock_clock, 2 * DELAY_S)
    assert rig.glance.ranges == []
    other.last_wanted_s = trio.current_time()
    await rig.pass_time(mock_clock, 3)
    assert (image.is_whole, other.is_whole) == (True, False)


async def test_urgent_want_passes_what_is_out(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """[I4] A guest's read is sent at once though a hydrating request is out."""
    image, other = opened(rig, held), opened(rig, held, 2)
    held.images.remove(other)
    start(rig, held)
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate))
    await rig.pass_time(mock_clock, DELAY_S + 1)
    assert len(rig.glance.out) == 1
    assert await other.read(0, 10) == content(2, 0, 10)
    gate.set()
    await rig.pass_time(mock_clock, 3)
    assert image.is_whole


async def test_least_missing_comes_first(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """One image at a time, the one that is soonest whole first: so the fewest guests are at risk."""
    large, small = opened(rig, held, 1, 40 * CHUNK), opened(rig, held, 2, 6 * CHUNK)
    start(rig, held, bytes_per_s=CHUNK)
    await rig.pass_time(mock_clock, DELAY_S + 5)
    assert small.present_bytes > 0
    assert large.present_bytes == 0
    await rig.pass_time(mock_clock, 5)
    assert small.is_whole
    assert 0 < large.present_bytes < 6 * CHUNK


async def test_rate_holds_over_all_images(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """`hydrate_rate` bounds what is fetched for all images together."""
    opened(rig, held, 1, 40 * CHUNK)
    opened(rig, held, 2, 40 * CHUNK)
    start(rig, held, bytes_per_s=4 * CHUNK)
    await rig.pass_time(mock_clock, DELAY_S + 10)
    assert 30 * CHUNK < rig.glance.sent_bytes <= 44 * CHUNK


async def test_ends_with_the_last_handle(
    rig: ImageRig, held: Held, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """Once nobody holds the image nothing more is asked for, and what hung does not hold up the next image."""
    expected_warnings("down; trying again")
    image = opened(rig, held)
    start(rig, held)
    rig.glance.always = DOWN
    await rig.pass_time(mock_clock, DELAY_S + 3)
    asked = len(rig.glance.ranges)
    assert asked > 0
    image.closed()
    rig.glance.always = Reply()
    await rig.pass_time(mock_clock, 20)
    assert len(rig.glance.ranges) == asked
    assert image.present_bytes == 0
    other = opened(rig, held, 2)
    await rig.pass_time(mock_clock, DELAY_S + 3)
    assert other.is_whole


async def test_outage_is_waited_out(
    rig: ImageRig, held: Held, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """While Glance is down other images have their turn; when it is back the rest comes."""
    expected_warnings("down; trying again")
    image, other = opened(rig, held), opened(rig, held, 2, 2 * SIZE_BYTES)
    start(rig, held)
    rig.glance.always = DOWN
    await rig.pass_time(mock_clock, int(DELAY_S + 2 * STEP_LIMIT_S + 5))
    assert image.present_bytes == other.present_bytes == 0
    rig.glance.always = Reply()
    await rig.pass_time(mock_clock, int(SET_ASIDE_S + STEP_LIMIT_S))
    assert image.is_whole
    assert other.is_whole


async def test_image_that_is_gone_is_left_alone_for_a_while(
    rig: ImageRig, held: Held, mock_clock: MockClock
) -> None:
    """One that Glance no longer has costs a request a minute and holds up no other."""
    image, other = opened(rig, held), opened(rig, held, 2, 2 * SIZE_BYTES)
    del rig.glance.records[image.record.id]
    rig.glance.replies.append(Reply(error=ImageNotFound("gone")))
    start(rig, held)
    await rig.pass_time(mock_clock, DELAY_S + 4)
    assert (image.present_bytes, other.is_whole) == (0, True)


async def test_images_that_hang_take_no_turns_from_others(
    rig: ImageRig, held: Held, mock_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """However many images bring nothing, one that can become whole does so soon."""
    expected_warnings("lost; trying again")
    for number in (1, 2, 3):
        opened(rig, held, number)
    other = opened(rig, held, 9, 2 * SIZE_BYTES)
    lost = dict.fromkeys(image.record.id for image in held.images[:3])
    honest = rig.glance.contents[other.record.id]

    def content_or_lost(start: int, stop: int) -> bytes:
        raise GlanceUnavailable("lost")

    rig.glance.contents |= dict.fromkeys(lost, content_or_lost)
    assert rig.glance.contents[other.record.id] is honest
    start(rig, held)
    await rig.pass_time(mock_clock, int(DELAY_S + 3 * STEP_LIMIT_S + 10))
    assert other.is_whole


async def test_full_cache_is_not_asked_to_hold_more(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """[I5] What could not be kept is not fetched for nobody."""
    image = opened(rig, held)
    held.is_full = True
    start(rig, held)
    await rig.pass_time(mock_clock, 2 * DELAY_S)
    assert rig.glance.ranges == []
    held.is_full = False
    await rig.pass_time(mock_clock, 3)
    assert image.is_whole


@pytest.mark.parametrize("value", ["false", "False", "no", "0"])
async def test_property_of_the_image_forbids_it(
    rig: ImageRig, held: Held, mock_clock: MockClock, value: str
) -> None:
    """An image with `lazyimg_hydrate=false` in Glance is fetched as it is read and no further."""
    image = opened(rig, held)
    image.record = replace(image.record, properties={"lazyimg_hydrate": value})
    start(rig, held)
    await rig.pass_time(mock_clock, 2 * DELAY_S)
    assert rig.glance.ranges == []


async def test_what_was_dropped_comes_again(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """A chunk dropped as damaged, before the place that hydration has come to, is fetched again."""
    image = opened(rig, held)
    start(rig, held)
    await rig.pass_time(mock_clock, DELAY_S + 2)
    rig.file.drop([3])
    assert image.missing_bytes > 0
    await rig.pass_time(mock_clock, int(LOOK_INTERVAL_S) + 2)
    assert image.is_whole
