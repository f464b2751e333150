"""Reads that wait, and requests that nobody has: what is known of them, on a clock of the test's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from image_fakes import ImageRig, Reply
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.daemon.inflight import (
    HUNG_AFTER_S,
    READS_NAMED_MAX,
    SAMPLE_INTERVAL_S,
    SAMPLES,
    InFlight,
    StuckRequests,
)
from lazyimg.errors import GlanceUnavailable
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.cachedir import CacheDir

UPPER_INODE = 1 << 62


@pytest.fixture
def rig(cache: CacheDir, nursery: trio.Nursery) -> ImageRig:
    return ImageRig(cache, nursery, requests_max=1, background_requests_max=1)


@pytest.fixture
def image(rig: ImageRig) -> LazyImage:
    return rig.add(1, 1 << 20)


class Waiting:
    """A read as the file system makes it, in a task of its own."""

    def __init__(self, in_flight: InFlight, image: LazyImage, start: int, nursery: trio.Nursery) -> None:
        self._in_flight, self._image, self._start = in_flight, image, start
        nursery.start_soon(self._run)

    async def _run(self) -> None:
        read = self._in_flight.begin_read(self._image.inode, self._start, 4096)
        try:
            await self._image.read(self._start, 4096)
        finally:
            self._in_flight.end_read(read)


async def causes(in_flight: InFlight) -> list[str]:
    """Return what the reads wait for, once the cache folder's threads have said what is absent."""
    while "cache" in (found := [read.waits_for for read in in_flight.statistics().reads]):
        await wait_all_tasks_blocked(0.001)
    return found


async def test_read_that_waits_is_described(
    image: LazyImage, rig: ImageRig, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """Image, range, age and cause are told while a read waits, and nothing once it is answered."""
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate))
    in_flight = InFlight({image.inode: image})
    Waiting(in_flight, image, 8192, nursery)
    await wait_all_tasks_blocked()
    await causes(in_flight)
    mock_clock.jump(3)
    now = in_flight.statistics()
    (read,) = now.reads
    assert (read.image, read.start, read.stop) == (image.record.id, 8192, 12288)
    assert (read.age_s, read.waits_for, read.retries) == (pytest.approx(3), "glance", 0)
    assert (now.reads_in_flight, now.reads_hung) == (1, 0)
    mock_clock.jump(HUNG_AFTER_S)
    assert in_flight.statistics().reads_hung == 1
    gate.set()
    while in_flight.statistics().reads_in_flight:
        await wait_all_tasks_blocked(0.001)
    assert in_flight.statistics().reads == ()


async def test_read_waits_for_a_slot(
    image: LazyImage, rig: ImageRig, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """While another image has all requests that may be out, a read waits for its turn."""
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate))
    other = rig.add(2, 1 << 20)
    in_flight = InFlight({image.inode: image, other.inode: other})
    Waiting(in_flight, image, 0, nursery)
    await wait_all_tasks_blocked()
    await causes(in_flight)
    Waiting(in_flight, other, 0, nursery)
    await wait_all_tasks_blocked()
    assert await causes(in_flight) == ["glance", "slot"]
    gate.set()


async def test_read_waits_for_a_retry(
    image: LazyImage, rig: ImageRig, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """After a failure a read waits for the pause to end, and its retries are counted from its own begin."""
    in_flight = InFlight({image.inode: image})
    rig.glance.always = Reply(error=GlanceUnavailable("down"))
    for _ in range(2):
        Waiting(in_flight, image, 0, nursery)
        await wait_all_tasks_blocked()
        await causes(in_flight)
    assert [(read.waits_for, read.retries) for read in in_flight.statistics().reads] == [
        ("retry", 1),
        ("retry", 0),
    ]
    nursery.cancel_scope.cancel()


async def test_what_is_not_fetched_waits_for_a_disk(image: LazyImage, mock_clock: MockClock) -> None:
    """A read that wants nothing of Glance waits for the cache disk, or for the upper folder's."""
    in_flight = InFlight({image.inode: image})
    reads = [in_flight.begin_read(inode, 0, 1) for inode in (image.inode, UPPER_INODE)]
    described = in_flight.statistics().reads
    assert [(read.image, read.waits_for) for read in described] == [
        (image.record.id, "cache"),
        (None, "upper"),
    ]
    for read in reads:
        in_flight.end_read(read)


async def test_only_the_oldest_reads_are_named(image: LazyImage, mock_clock: MockClock) -> None:
    """[I5] However many wait, a snapshot names so many, and counts them all."""
    in_flight = InFlight({})
    for start in range(READS_NAMED_MAX + 5):
        in_flight.begin_read(UPPER_INODE, start, 1)
    now = in_flight.statistics()
    assert [read.start for read in now.reads] == list(range(READS_NAMED_MAX))
    assert now.reads_in_flight == READS_NAMED_MAX + 5


@pytest.fixture
def queue() -> Iterator[tuple[int, int]]:
    """A pipe that stands for /dev/fuse: readable while requests lie in the kernel's queue."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_stuck_is_what_stays(tmp_path: Path, queue: tuple[int, int]) -> None:
    """Requests that the kernel counts more than we do, each time of several; what lies in the queue is not stuck."""
    waiting, in_flight = tmp_path / "waiting", InFlight({})
    stuck = StuckRequests(waiting, queue[0], in_flight)
    in_flight.count = 2
    for number, count in ((5, None), (4, None), (9, 2)):
        waiting.write_text(f"{number}\n")
        stuck.sample()
        assert stuck.count == count
    os.write(queue[1], b"x")
    stuck.sample()
    assert stuck.count == 0


def test_stuck_is_not_known_without_fusectl(tmp_path: Path, queue: tuple[int, int]) -> None:
    """Where the kernel's count cannot be read nothing is claimed."""
    stuck = StuckRequests(tmp_path / "none", queue[0], InFlight({}))
    for _ in range(SAMPLES):
        stuck.sample()
    assert stuck.count is None


async def test_samples_are_taken_now_and_then(
    tmp_path: Path, queue: tuple[int, int], autojump_clock: MockClock
) -> None:
    """The watch samples by itself: what stays for its first samples is stuck."""
    (tmp_path / "waiting").write_text("3")
    stuck = StuckRequests(tmp_path / "waiting", queue[0], InFlight({}))
    with trio.move_on_after(SAMPLE_INTERVAL_S * (SAMPLES - 1) + 1):
        await stuck.watch()
    assert stuck.count == 3
