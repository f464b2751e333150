"""Where a store cannot serve ranges, one stream brings the source and readers wait for their part of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from image_fakes import MIB, ImageRig, Reader, Reply, chunk_bytes
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import GlanceUnavailable, ImageNotFound, RangesNotSupported, ReadTimeout, WholeBody
from lazyimg.image.fetcher import Fetcher
from lazyimg.store.cachedir import CacheDir

COUNT = 40
SIZE_BYTES = COUNT * CHUNK - 100
NO_RANGES = RangesNotSupported("Getting images randomly from this store is not supported")


@pytest.fixture
def fetcher(rig: ImageRig) -> Fetcher:
    return rig.add(1, SIZE_BYTES).fetcher


def expected(*chunks: int) -> dict[int, bytes]:
    return chunk_bytes(1, chunks, SIZE_BYTES)


# ── going over to the stream ──


async def test_refused_ranges_make_a_stream(rig: ImageRig, fetcher: Fetcher) -> None:
    """Glance's 400 "not supported" is believed at once; the reader that met it gets its bytes from the stream."""
    rig.glance.replies.append(Reply(error=NO_RANGES))
    assert await fetcher.fetch([3, 30]) == expected(3, 30)
    assert fetcher.source == "stream"
    assert rig.glance.streams == 1


async def test_three_whole_bodies_in_a_row_make_a_stream(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock
) -> None:
    """Old servers answer 206 with everything: three times without one good range means that they cannot do better."""
    rig.glance.replies.extend(Reply(error=WholeBody("whole")) for _ in range(3))
    assert await fetcher.fetch([3]) == expected(3)
    assert (fetcher.source, rig.glance.streams, len(rig.glance.ranges)) == ("stream", 1, 3)


async def test_whole_bodies_among_good_ranges_are_retried(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """Never a single lie, nor many: a source that has served one range can do ranges."""
    expected_warnings("trying again in")
    rig.glance.replies.extend(Reply(error=WholeBody("whole")) for _ in range(2))
    assert await fetcher.fetch([3]) == expected(3)
    rig.glance.replies.extend(Reply(error=WholeBody("whole")) for _ in range(5))
    assert await fetcher.fetch([9]) == expected(9)
    assert (fetcher.source, rig.glance.streams) == ("ranges", 0)


async def test_flights_still_out_serve_their_readers(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """Going over to the stream loses no reader of a range that was out already."""
    held = Reply(gate=trio.Event())
    rig.glance.replies.extend([held, Reply(error=NO_RANGES)])
    first = Reader(nursery, fetcher, 20)
    await wait_all_tasks_blocked()
    second = Reader(nursery, fetcher, 2)
    await wait_all_tasks_blocked()
    assert fetcher.source == "stream"
    assert second.got == expected(2)
    assert held.gate is not None
    held.gate.set()
    await wait_all_tasks_blocked()
    assert first.got == expected(20)


# ── how far a stream goes ──


async def test_streams_first_bytes_wake_their_reader(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """A reader waits for its part of the stream, not for its end; all share one stream."""
    fetcher.ladder.source = "stream"
    rig.glance.replies.append(reply := Reply(hold_at_bytes=5 * CHUNK))
    early, late = Reader(nursery, fetcher, 2), Reader(nursery, fetcher, 35)
    await wait_all_tasks_blocked()
    assert (early.got, late.got) == (expected(2), None)
    reply.resume.set()
    await wait_all_tasks_blocked()
    assert late.got == expected(35)
    assert rig.glance.streams == 1


async def test_lookups_stream_ends_with_the_first_bytes(rig: ImageRig, fetcher: Fetcher) -> None:
    """A stream that only a lookup wanted stops after what that needs, so that names cost little."""
    fetcher.ladder.source = "stream"
    head = range(MIB // CHUNK)
    assert await fetcher.fetch(head, for_lookup=True) == expected(*head)
    await wait_all_tasks_blocked()
    assert MIB <= rig.glance.sent_bytes < MIB + 2 * CHUNK
    assert fetcher.statistics().waiting_chunks == 0


async def test_readers_stream_goes_to_the_end(rig: ImageRig, fetcher: Fetcher) -> None:
    """The next reader's stream would begin at zero again, so a guest's is read whole, and then all is present."""
    fetcher.ladder.source = "stream"
    assert await fetcher.fetch([2]) == expected(2)
    await wait_all_tasks_blocked()
    await rig.wait_written()
    assert rig.glance.sent_bytes == SIZE_BYTES
    assert rig.file.is_whole


async def test_stream_nobody_has_open_ends(rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery) -> None:
    """With the last handle gone, a stream goes no further than somebody waits."""
    fetcher.ladder.source = "stream"
    rig.glance.replies.append(reply := Reply(hold_at_bytes=5 * CHUNK))
    reader = Reader(nursery, fetcher, 2)
    await wait_all_tasks_blocked()
    assert reader.got == expected(2)
    fetcher.abandon_background()
    reply.resume.set()
    await wait_all_tasks_blocked()
    assert rig.glance.sent_bytes < 6 * CHUNK
    assert fetcher.is_idle or not fetcher.statistics().waiting_chunks


async def test_stream_that_passed_a_chunk_comes_round_again(rig: ImageRig, fetcher: Fetcher) -> None:
    """[I1] What could not be stored when it passed is brought by another stream, never taken for present."""
    fetcher.ladder.source = "stream"
    rig.fake_space.has_room = False
    assert await fetcher.fetch([2]) == expected(2)
    await wait_all_tasks_blocked()
    rig.unstored.forget(rig.writers[-1])
    assert await fetcher.fetch([1]) == expected(1)
    assert rig.glance.streams == 2


async def test_streamed_wants_leave_nothing_behind(rig: ImageRig, fetcher: Fetcher) -> None:
    """[I5] What a stream brought is not kept in the plan of ranges, however long it runs."""
    fetcher.ladder.source = "stream"
    for chunk in range(COUNT):
        await fetcher.fetch([chunk])
    await wait_all_tasks_blocked()
    assert not fetcher._plan.has_urgent
    assert not fetcher._plan.has_background


# ── a stream that fails ──


async def test_broken_stream_begins_again(rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock) -> None:
    """A stream that breaks is begun again until its readers have their bytes."""
    fetcher.ladder.source = "stream"
    rig.glance.replies.extend(
        [Reply(length_bytes=3 * CHUNK + 9), Reply(error=GlanceUnavailable("busy", retry_after_s=4))]
    )
    assert await fetcher.fetch([1, 7]) == expected(1, 7)
    assert rig.glance.streams == 3
    assert rig.glance.asked_at[2] - rig.glance.asked_at[1] == pytest.approx(4)


async def test_limit_counts_time_without_progress(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """On a stream a reader waits as long as bytes keep coming, and `read_timeout` after they stop."""
    fetcher.ladder.source = "stream"
    rig.glance.replies.append(reply := Reply(hold_at_bytes=5 * CHUNK, length_bytes=9 * CHUNK))
    hang = Reply(gate=trio.Event())
    reply.then = GlanceUnavailable("broken")
    rig.glance.replies.append(hang)
    reader = Reader(nursery, fetcher, 30)
    await wait_all_tasks_blocked()
    mock_clock.jump(290)
    reply.resume.set()
    await wait_all_tasks_blocked()
    mock_clock.jump(290)
    await wait_all_tasks_blocked()
    assert reader.ended_at is None
    mock_clock.jump(20)
    await wait_all_tasks_blocked()
    assert isinstance(reader.error, ReadTimeout)


async def test_stream_that_breaks_at_one_place_keeps_nobody_for_ever(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I5] Coming as far as before is no progress: a reader behind the break has its limit."""
    expected_warnings("trying again")
    fetcher.ladder.source = "stream"
    rig.glance.always.length_bytes = 9 * CHUNK
    rig.glance.always.then = GlanceUnavailable("broken")
    began_at = trio.current_time()
    with pytest.raises(ReadTimeout):
        await fetcher.fetch([30])
    assert trio.current_time() - began_at == pytest.approx(300, abs=10)


async def test_record_that_is_gone_ends_a_streams_readers(
    rig: ImageRig, fetcher: Fetcher, mock_clock: MockClock
) -> None:
    """404 on the record is final on a stream too."""
    fetcher.ladder.source = "stream"
    rig.glance.always.error = rig.glance.image_error = ImageNotFound("gone")
    with pytest.raises(ImageNotFound):
        await fetcher.fetch([1])


async def test_bug_in_a_stream_does_not_escape(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I6] An unforeseen exception in a stream is logged and the stream begun again."""
    expected_warnings("a stream failed in an unforeseen way")
    fetcher.ladder.source = "stream"
    rig.glance.replies.append(Reply(error=RuntimeError("a bug")))
    assert await fetcher.fetch([1]) == expected(1)


async def test_stream_waits_for_a_slot(cache: CacheDir, nursery: trio.Nursery) -> None:
    """[I5] A stream counts as a flight; it takes the slot that comes free, in turn with the others."""
    rig = ImageRig(cache, nursery, requests_max=1, background_requests_max=1)
    ranges, stream = rig.add(2, SIZE_BYTES).fetcher, rig.add(1, SIZE_BYTES).fetcher
    stream.ladder.source = "stream"
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate))
    first = Reader(nursery, ranges, 0)
    await wait_all_tasks_blocked()
    streamed = Reader(nursery, stream, 4)
    await wait_all_tasks_blocked()
    # Asks once the stream stands in the queue, so it must not be served before it.
    rig.glance.replies.append(held := Reply(gate=trio.Event()))
    later = Reader(nursery, ranges, 9)
    await wait_all_tasks_blocked()
    assert rig.glance.streams == 0
    gate.set()
    await wait_all_tasks_blocked()
    assert first.got == chunk_bytes(2, [0], SIZE_BYTES)
    assert rig.glance.streams == 1
    assert held.gate is not None
    held.gate.set()
    await wait_all_tasks_blocked()
    assert streamed.got == expected(4)
    assert later.got == chunk_bytes(2, [9], SIZE_BYTES)
