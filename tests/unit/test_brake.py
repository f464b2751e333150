"""What a stream brings for nobody comes at hydration's pace, and what somebody waits for as fast as it can."""

from __future__ import annotations

import pytest
import trio
from image_fakes import BODY_STEP_BYTES, ImageRig, Reply
from qcow2_writer import Geometry, Image, write_image
from rawview_rig import open_raw
from store_images import content
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.pace import SLOW_STREAMS_MAX, Pace
from lazyimg.image.brake import EAGER_S, SlowStreams
from lazyimg.image.hydrator import SET_ASIDE_S, STEP_LIMIT_S, Hydrator
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.spool import LINGER_S

DELAY_S = 30
COUNT = 80
SIZE_BYTES = COUNT * CHUNK
RATE = 2 * CHUNK
# What may come beyond the rate: the first second's, and what is in the hand of each stream.
SLACK = 2 * CHUNK


class Held:
    """All images are held open, and there is room."""

    is_full = False

    def __init__(self) -> None:
        self.images: list[LazyImage] = []

    def open_images(self) -> list[LazyImage]:
        return self.images

    async def held_images(self) -> list[LazyImage]:
        await trio.lowlevel.checkpoint()
        return self.images


@pytest.fixture
def rig(rig: ImageRig, mock_clock: MockClock) -> ImageRig:
    """The one of all modules, with a rate."""
    rig.slow_streams = SlowStreams(Pace(RATE), rig.disk)
    return rig


@pytest.fixture
def held(rig: ImageRig) -> Held:
    one = Held()
    hydrator = Hydrator(one, one, rig.disk, rig.slow_streams.pace, delay_s=DELAY_S)
    rig.nursery.start_soon(hydrator.run)
    return one


def streamed(rig: ImageRig, held: Held | None = None, number: int = 1) -> LazyImage:
    """Open an image whose store serves no ranges."""
    image = rig.add(number, SIZE_BYTES)
    image.fetcher.ladder.source = "stream"
    image.opened()
    if held is not None:
        held.images.append(image)
    return image


async def pass_time(rig: ImageRig, clock: MockClock, seconds: float) -> None:
    """Let the clock go on in steps of what a part of a body is worth, and what is due then be done."""
    step_s = BODY_STEP_BYTES / rig.slow_streams.pace.bytes_per_s * 1.001
    for _ in range(round(seconds / step_s)):
        await rig.settle()
        clock.jump(step_s)
    await rig.settle()


async def read(image: LazyImage, chunk: int) -> None:
    assert await image.read(chunk * CHUNK, 10) == content(1, chunk * CHUNK, chunk * CHUNK + 10)


async def test_hydration_of_a_stream_keeps_to_the_rate(
    rig: ImageRig, held: Held, mock_clock: MockClock
) -> None:
    """`hydrate_rate` bounds a stream too, which is one all the same, and makes its image whole."""
    image = streamed(rig, held)
    await pass_time(rig, mock_clock, DELAY_S + 10)
    assert 9 * RATE - SLACK <= rig.glance.sent_bytes <= 10 * RATE + SLACK
    await pass_time(rig, mock_clock, COUNT // 2 - 8)
    assert (image.is_whole, rig.glance.streams, rig.glance.sent_bytes) == (True, 1, SIZE_BYTES)


async def test_guest_waits_for_no_pace(rig: ImageRig, held: Held, mock_clock: MockClock) -> None:
    """[I4] A guest's want of a part that comes later ends the slowness at once, and all that comes before flies by."""
    image = streamed(rig, held)
    await pass_time(rig, mock_clock, DELAY_S + 5)
    began_s = trio.current_time()
    await read(image, COUNT - 10)
    assert trio.current_time() == began_s
    assert rig.glance.streams == 1


async def test_guests_stream_slows_down_once_it_is_left_alone(rig: ImageRig, mock_clock: MockClock) -> None:
    """What a booting guest leaves of its stream is slowed down, but not between two of its reads."""
    image = streamed(rig)
    rig.glance.always.hold_at_bytes = 20 * CHUNK
    await read(image, 3)
    assert rig.glance.sent_bytes < 21 * CHUNK
    await pass_time(rig, mock_clock, int(EAGER_S) + 1)
    rig.glance.always.resume.set()
    await pass_time(rig, mock_clock, 5)
    assert rig.glance.sent_bytes <= 20 * CHUNK + 5 * RATE + SLACK
    await read(image, COUNT - 40)
    await rig.settle()
    assert rig.glance.sent_bytes == SIZE_BYTES, "the next read may follow soon"


async def test_prefetch_is_no_hydration(rig: ImageRig, mock_clock: MockClock) -> None:
    """Somebody waits for what `lazyimg prefetch` fetches: it has no rate."""
    image = streamed(rig)
    steps = [step async for step in image.prefetch()]
    assert (steps, trio.current_time()) == ([SIZE_BYTES], 0)
    assert image.is_whole


async def test_slow_streams_take_no_slot_from_guests(rig: ImageRig, mock_clock: MockClock) -> None:
    """[I4] Streams that take hours leave all slots to urgent wants; [I5] for one too many an earlier one ends."""
    images = [streamed(rig, number=number) for number in range(1, SLOW_STREAMS_MAX + 2)]
    rig.glance.always.hold_at_bytes = 2 * CHUNK
    for image in images[:-1]:
        await image.read(0, 10)
    assert not rig.slots.take_nowait(urgent=True, when_free=lambda: None)
    await pass_time(rig, mock_clock, int(EAGER_S) + 1)
    rig.glance.always.resume.set()
    await rig.settle()
    free = sum(rig.slots.take_nowait(urgent=True, when_free=lambda: None) for _ in range(5))
    assert free == 4
    for _ in range(free):
        rig.slots.give_back(urgent=True)
    assert all(image.fetcher._is_streaming for image in images[:-1])
    rig.glance.replies.append(another := Reply(hold_at_bytes=2 * CHUNK))
    await images[-1].read(0, 10)
    await pass_time(rig, mock_clock, int(EAGER_S) + 1)
    another.resume.set()
    await rig.settle()
    streaming = [image.fetcher._is_streaming for image in images]
    assert (sum(streaming), streaming[-1]) == (SLOW_STREAMS_MAX, True)


async def test_slow_stream_that_ended_is_begun_again(rig: ImageRig, mock_clock: MockClock) -> None:
    """A reader of a stream that made way for others gets its bytes from another, and every slot comes back."""
    image = streamed(rig)
    await rig.settle()
    rig.glance.always.hold_at_bytes = 2 * CHUNK
    await read(image, 0)
    await pass_time(rig, mock_clock, int(EAGER_S) + 1)
    rig.glance.always.resume.set()
    await rig.settle()
    assert image.fetcher._is_streaming
    assert image.fetcher._brake.end_nowait()
    await rig.settle()
    assert not image.fetcher._is_streaming
    await read(image, COUNT - 1)
    await rig.settle()
    assert rig.glance.streams == 2
    assert sum(rig.slots.take_nowait(urgent=True, when_free=lambda: None) for _ in range(5)) == 4


async def test_slow_stream_is_let_come_to_what_is_absent(
    rig: ImageRig, held: Held, mock_clock: MockClock
) -> None:
    """What is absent only at the end comes by one stream, though that takes longer than a hydrator's step."""
    assert COUNT * CHUNK / (CHUNK // 4) > STEP_LIMIT_S + SET_ASIDE_S
    rig.slow_streams.pace.bytes_per_s = CHUNK // 4
    image = streamed(rig, held)
    rig.file.write(0, [content(1, chunk * CHUNK, (chunk + 1) * CHUNK) for chunk in range(COUNT - 1)])
    await pass_time(rig, mock_clock, DELAY_S + COUNT * 4 + 3)
    assert (image.is_whole, rig.glance.streams) == (True, 1)


# ── the spool of a qcow2 ──


@pytest.fixture(scope="module")
def qcow2() -> Image:
    return write_image(Geometry(3, 16, COUNT * CHUNK), dict.fromkeys(range(COUNT), "data"), seed=3)


@pytest.mark.slow
async def test_spool_for_hydration_keeps_to_the_rate(
    rig: ImageRig, held: Held, mock_clock: MockClock, qcow2: Image
) -> None:
    """A spool that only hydration fills is filled at its pace, and at full speed once a guest reads."""
    rig.glance.has_ranges = False
    image = await open_raw(rig, 1, qcow2.source)
    image.opened()
    held.images.append(image)
    await pass_time(rig, mock_clock, DELAY_S + LINGER_S - 10)
    came = rig.glance.sent_bytes
    assert 15 * RATE <= came <= 20 * RATE + SLACK
    began_s = trio.current_time()
    last = (COUNT - 1) * CHUNK
    assert await image.read(last, 10) == qcow2.read(last, last + 10)
    assert trio.current_time() == began_s
    assert rig.glance.streams == 1
