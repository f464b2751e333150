"""Single flight, urgent first, nobody harmed by who leaves: the fetcher on a Glance in memory."""

from __future__ import annotations

import pytest
import trio
from image_fakes import ImageRig, Reader, Reply, chunk_bytes
from trio.testing import MockClock, wait_all_tasks_blocked

import lazyimg.image.slots as slots_module
from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import (
    GlanceUnavailable,
)
from lazyimg.image.fetcher import Fetcher
from lazyimg.store.cachedir import CacheDir

COUNT = 40
SIZE_BYTES = COUNT * CHUNK - 100


@pytest.fixture
def fetcher(rig: ImageRig) -> Fetcher:
    return rig.add(1, SIZE_BYTES).fetcher


def expected(*chunks: int) -> dict[int, bytes]:
    return chunk_bytes(1, chunks, SIZE_BYTES)


# ── single flight ──


async def test_many_readers_of_one_chunk_cause_one_request(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """[I3] Fifty readers of one chunk share one flight, and all get its bytes."""
    gate = rig.glance.always.gate = trio.Event()
    readers = [Reader(nursery, fetcher, 3) for _ in range(50)]
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    assert all(reader.got == expected(3) for reader in readers)
    assert rig.glance.ranges == [(3 * CHUNK, 4 * CHUNK)]


async def test_overlapping_readers_ask_each_byte_once(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """[I3] Whatever overlaps, no byte is asked for while it is in flight."""
    gate = rig.glance.always.gate = trio.Event()
    readers = [Reader(nursery, fetcher, *range(n, n + 6)) for n in range(0, 30, 3)]
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    assert [reader.got for reader in readers] == [expected(*range(n, n + 6)) for n in range(0, 30, 3)]
    assert rig.glance.asked_twice == []
    assert sum(stop - start for start, stop in rig.glance.ranges) == 33 * CHUNK


async def test_waiter_is_woken_before_the_body_ends(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """A request may be wider than a read without making it wait: each chunk goes out as it arrives."""
    gate = trio.Event()
    rig.glance.replies.append(reply := Reply(gate=gate, hold_at_bytes=CHUNK + 1))
    wide = Reader(nursery, fetcher, 10, 11, 12)
    await wait_all_tasks_blocked()
    only = Reader(nursery, fetcher, 10)
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    assert (only.got, wide.got) == (expected(10), None)
    reply.resume.set()
    await wait_all_tasks_blocked()
    assert wide.got == expected(10, 11, 12)
    assert len(rig.glance.ranges) == 1


async def test_cancelled_reader_harms_nobody(rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery) -> None:
    """A flight outlives the reader that came first; what is not asked yet and nobody else wants is dropped."""
    gate = rig.glance.always.gate = trio.Event()
    # All four slots are taken by the flights of one who stays.
    stays = Reader(nursery, fetcher, 0, 10, 20, 30)
    await wait_all_tasks_blocked()
    leaves = Reader(nursery, fetcher, 0, 10, 5, 6)
    also = Reader(nursery, fetcher, 6)
    await wait_all_tasks_blocked()
    leaves.scope.cancel()
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    assert stays.got == expected(0, 10, 20, 30)
    assert also.got == expected(6)
    assert rig.glance.ranges[4:] == [(6 * CHUNK, 7 * CHUNK)]


async def test_only_reader_of_a_flight_leaves_and_its_chunk_is_kept(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """What was asked arrives and is stored, though nobody waits for it any more."""
    gate = rig.glance.always.gate = trio.Event()
    reader = Reader(nursery, fetcher, 5)
    await wait_all_tasks_blocked()
    reader.scope.cancel()
    gate.set()
    await wait_all_tasks_blocked()
    await rig.wait_written()
    assert 5 not in rig.file.absent(range(COUNT))


# ── urgency and limits ──


async def test_urgent_goes_next_where_background_has_all_slots(
    cache: CacheDir, nursery: trio.Nursery
) -> None:
    """[I4] With every slot taken by background work, the first that is free serves the reader."""
    rig = ImageRig(cache, nursery, requests_max=2, background_requests_max=2, request_bytes_max=CHUNK)
    fetcher = rig.add(1, SIZE_BYTES).fetcher
    replies = [Reply(gate=trio.Event()) for _ in range(3)]
    rig.glance.replies.extend(replies)
    fetcher.want_background(range(10))
    await wait_all_tasks_blocked()
    reader = Reader(nursery, fetcher, 30)
    await wait_all_tasks_blocked()
    assert len(rig.glance.ranges) == 2
    assert replies[0].gate is not None
    replies[0].gate.set()
    await wait_all_tasks_blocked()
    assert rig.glance.ranges[2] == (30 * CHUNK, 31 * CHUNK)
    for reply in replies:
        assert reply.gate is not None
        reply.gate.set()
    await wait_all_tasks_blocked()
    assert reader.got == expected(30)


async def test_paused_image_leaves_slots_to_others(
    cache: CacheDir, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """[I6] An image that pauses after a failure does not hold up the reader of another one."""
    rig = ImageRig(cache, nursery, requests_max=1, background_requests_max=1, request_bytes_max=CHUNK)
    failing, healthy = rig.add(1, SIZE_BYTES).fetcher, rig.add(2, SIZE_BYTES).fetcher
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate, error=GlanceUnavailable("busy")))
    Reader(nursery, failing, 0, 5)
    await wait_all_tasks_blocked()
    other = Reader(nursery, healthy, 3)
    Reader(nursery, failing, 9)
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    assert other.got == chunk_bytes(2, [3], SIZE_BYTES)


async def test_no_more_requests_than_allowed(rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery) -> None:
    """[I5] However much is wanted, `requests_max` flights are out, and all of it comes."""
    readers = [Reader(nursery, fetcher, chunk) for chunk in range(0, COUNT, 2)]
    fetcher.want_background(range(1, COUNT, 2))
    await wait_all_tasks_blocked()
    assert all(reader.got is not None for reader in readers)
    assert rig.glance.out_max <= 4


async def test_budget_bounds_what_is_received_and_not_written(cache: CacheDir, nursery: trio.Nursery) -> None:
    """[I5] A disk that hangs stops the flights after `write_buffer_max` bytes; who waited for those has them."""
    rig = ImageRig(cache, nursery, write_buffer_max_bytes=2 * CHUNK)
    fetcher = rig.add(1, SIZE_BYTES).fetcher
    async with rig.write_limiter, trio.open_nursery() as others:
        # The disk hangs: all threads that write are taken.
        rig.write_limiter.total_tokens = 1
        readers = [Reader(others, fetcher, chunk) for chunk in range(8)]
        await wait_all_tasks_blocked()
        # Two are in the budget, one a flight waits for it: nothing else was received.
        assert sum(reader.got is not None for reader in readers) <= 2 + len(rig.glance.out)
        assert rig.glance.sent_bytes <= (3 + len(rig.glance.out)) * CHUNK
        others.cancel_scope.cancel()
    await rig.wait_written()


# ── the end ──


async def test_guesses_are_shed_while_readers_wait(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """[I4] With readers waiting for a slot nothing is wanted ahead; what is asked for is what they need."""
    gate = trio.Event()
    rig.glance.replies.extend(Reply(gate=gate) for _ in range(5))
    readers = [Reader(nursery, fetcher, chunk) for chunk in (0, 4, 8, 12, 16)]
    await wait_all_tasks_blocked()
    assert rig.slots.is_crowded
    late = trio.CancelScope()

    async def read_ahead() -> None:
        with late:
            await fetcher.fetch([20], ahead=range(21, 30))

    nursery.start_soon(read_ahead)
    fetcher.want_background(range(30, 40))
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    await fetcher.wait_written()
    assert all(reader.got for reader in readers)
    assert {start // CHUNK for start, _ in rig.glance.ranges} == {0, 4, 8, 12, 16, 20}
    assert max(stop - start for start, stop in rig.glance.ranges) == CHUNK
    assert fetcher.is_idle


async def test_guesses_of_one_image_are_limited(
    cache: CacheDir, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I5] Read-ahead that does not get a slot is forgotten above a limit, and may be asked for again later."""
    monkeypatch.setattr(slots_module, "IMAGE_GUESSES_MAX", 32)
    rig = ImageRig(cache, nursery, background_requests_max=1, request_bytes_max=CHUNK)
    fetcher = rig.add(1, 64 * CHUNK).fetcher
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate))
    for start in range(0, 64, 16):
        fetcher.want_background(range(start, start + 16))
    await wait_all_tasks_blocked()
    assert rig.slots.guesses.room(fetcher) == 0
    gate.set()
    while not fetcher.is_idle:
        await wait_all_tasks_blocked(0.001)
        await fetcher.wait_written()
    assert 32 <= len(rig.glance.ranges) <= 48
    assert rig.slots.guesses.room(fetcher) == 32


async def test_flight_counts_from_the_moment_it_is_started(rig: ImageRig, fetcher: Fetcher) -> None:
    """A fetcher whose flight has not run yet is not idle: its image must not be dropped."""
    fetcher.want_background([3])
    assert not fetcher.is_idle
    await wait_all_tasks_blocked()
    await fetcher.wait_written()
    assert fetcher.is_idle


async def test_stopped_fetcher_tells_its_readers(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """Whoever waits for, or asks, an image that was dropped hears so at once, and its flights end."""
    rig.glance.always.gate = trio.Event()
    reader = Reader(nursery, fetcher, 1)
    await wait_all_tasks_blocked()
    fetcher.stop()
    late = Reader(nursery, fetcher, 2)
    await wait_all_tasks_blocked()
    for one in (reader, late):
        assert isinstance(one.error, GlanceUnavailable)
        assert "dropped" in str(one.error)
    assert rig.glance.out == []
    assert fetcher.is_idle


async def test_idle_means_nothing_waited_for_in_flight_or_unwritten(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery
) -> None:
    """[I7] An image at work is told from one that may be dropped."""
    assert fetcher.is_idle
    gate = rig.glance.always.gate = trio.Event()
    reader = Reader(nursery, fetcher, 1)
    await wait_all_tasks_blocked()
    assert not fetcher.is_idle
    gate.set()
    await wait_all_tasks_blocked()
    assert reader.got == expected(1)
    await rig.wait_written()
    assert fetcher.is_idle
