"""What fails is retried until the reader's limit, and costs no reader that could wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from image_fakes import ImageRig, Reader, Reply, chunk_bytes
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import (
    GlanceUnavailable,
    ImageForbidden,
    ImageNotFound,
    ReadTimeout,
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


# ── Glance fails ──


async def test_failed_attempt_is_retried_and_only_for_what_is_missing(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock
) -> None:
    """A short body's chunks are kept, and only the rest is asked again."""
    rig.glance.replies.append(Reply(length_bytes=2 * CHUNK + 5))
    assert await fetcher.fetch([4, 5, 6, 7]) == expected(4, 5, 6, 7)
    assert rig.glance.ranges == [(4 * CHUNK, 8 * CHUNK), (6 * CHUNK, 8 * CHUNK)]
    statistics = fetcher.statistics()
    assert (statistics.requests, statistics.fetched_bytes, statistics.retries) == (2, 4 * CHUNK, 1)
    assert statistics.last_error == "a short body"


async def test_body_that_ends_early_without_an_error_is_retried(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock
) -> None:
    """[I1] Bytes that did not come are asked again, even if whoever brings them did not notice."""
    rig.glance.contents[next(iter(rig.glance.contents))] = _short_once(rig)
    assert await fetcher.fetch([4, 5]) == expected(4, 5)
    assert rig.glance.ranges == [(4 * CHUNK, 6 * CHUNK), (5 * CHUNK, 6 * CHUNK)]


def _short_once(rig: ImageRig) -> Callable[[int, int], bytes]:
    whole = next(iter(rig.glance.contents.values()))
    return lambda start, stop: whole(start, stop)[: CHUNK + 7 if len(rig.glance.ranges) == 1 else None]


async def test_pauses_grow_and_stay_short_while_a_reader_waits(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """Retries back off with jitter, but a reader never waits more than `retry_pause_max` for the next attempt."""
    expected_warnings("trying again in")
    rig.glance.replies.extend(Reply(error=GlanceUnavailable("down")) for _ in range(12))
    assert await fetcher.fetch([1]) == expected(1)
    pauses = [b - a for a, b in zip(rig.glance.asked_at, rig.glance.asked_at[1:], strict=False)]
    assert len(pauses) == 12
    for n, pause in enumerate(pauses):
        full = min(0.05 * 2**n, 5)
        assert full / 2 - 1e-6 <= pause <= full + 1e-6
    # By chance: that eleven pauses are all of one share of their full length is as good as impossible.
    assert len({round(pause / min(0.05 * 2**n, 5), 3) for n, pause in enumerate(pauses)}) > 2


@pytest.mark.parametrize(("retry_after_s", "shortest", "longest"), [(3, 3, 3), (3600, 5, 5), (0, 0.02, 0.05)])
async def test_retry_after_is_respected_up_to_the_longest_pause(
    rig: ImageRig,
    fetcher: Fetcher,
    autojump_clock: MockClock,
    retry_after_s: float,
    shortest: float,
    longest: float,
) -> None:
    """What the server asks for is done, as far as a guest can wait for it."""
    rig.glance.replies.append(Reply(error=GlanceUnavailable("busy", retry_after_s=retry_after_s)))
    await fetcher.fetch([1])
    pause = rig.glance.asked_at[1] - rig.glance.asked_at[0]
    assert shortest - 1e-6 <= pause <= longest + 1e-6


async def test_read_times_out_and_the_next_read_tries_again(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I5] A reader waits `read_timeout` and no longer; nothing of its failure remains."""
    expected_warnings("trying again in")
    rig.glance.always.error = GlanceUnavailable("down")
    began_at = trio.current_time()
    with pytest.raises(ReadTimeout, match=r"image .*chunk 3 .*300 s.*down.*the next read tries again"):
        await fetcher.fetch([3])
    assert trio.current_time() - began_at == pytest.approx(300)
    rig.glance.always.error = None
    assert await fetcher.fetch([3]) == expected(3)


async def test_hanging_request_times_out_and_its_late_bytes_serve_the_next_reader(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A flight that hangs costs its reader the limit; the next one waits for the same flight."""
    gate = rig.glance.always.gate = trio.Event()
    with pytest.raises(ReadTimeout, match="no answer"):
        await fetcher.fetch([3])
    reader = Reader(nursery, fetcher, 3)
    await wait_all_tasks_blocked()
    gate.set()
    await wait_all_tasks_blocked()
    assert reader.got == expected(3)
    assert len(rig.glance.ranges) == 1


@pytest.mark.parametrize("error", [ImageNotFound("no data"), ImageForbidden("no data")])
async def test_refused_bytes_of_an_active_image_are_retried(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, error: Exception
) -> None:
    """404 or 403 on the bytes alone is a passing fault while the record says active."""
    rig.glance.replies.extend([Reply(error=error), Reply(error=error)])
    assert await fetcher.fetch([1]) == expected(1)
    assert len(rig.glance.image_calls) == 2


@pytest.mark.parametrize("error", [ImageNotFound("gone"), ImageForbidden("not yours")])
async def test_refused_record_is_final_at_once(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery, mock_clock: MockClock, error: Exception
) -> None:
    """404 or 403 on the record itself ends every read at once, and each reader gets an error of its own."""
    rig.glance.always.error = rig.glance.image_error = error
    readers = [Reader(nursery, fetcher, 1), Reader(nursery, fetcher, 1, 9)]
    await wait_all_tasks_blocked()
    assert [type(reader.error) for reader in readers] == [type(error)] * 2
    assert readers[0].error is not readers[1].error
    assert len(rig.glance.ranges) <= 2


async def test_record_that_cannot_be_asked_decides_nothing(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock
) -> None:
    """While Glance's record is not to be had, refused bytes are retried."""
    rig.glance.image_error = GlanceUnavailable("down")
    rig.glance.replies.extend(Reply(error=ImageNotFound("no data")) for _ in range(2))
    assert await fetcher.fetch([1]) == expected(1)


async def test_bug_in_a_flight_does_not_escape(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I6] An unforeseen exception is logged and retried like a passing fault; no nursery ends."""
    expected_warnings("a flight failed in an unforeseen way")
    rig.glance.replies.extend(
        [Reply(error=RuntimeError("a bug")), Reply(length_bytes=9, then=ValueError("x"))]
    )
    assert await fetcher.fetch([1]) == expected(1)


async def test_bug_in_asking_for_the_record_does_not_escape(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I6] Neither does one that shows while a refusal is being checked; the bytes are asked again."""
    expected_warnings("asking for its record failed in an unforeseen way")
    rig.glance.image_error = RuntimeError("a bug")
    rig.glance.replies.append(Reply(error=ImageNotFound("no data")))
    assert await fetcher.fetch([1]) == expected(1)


async def test_failed_background_wants_are_forgotten(
    rig: ImageRig, fetcher: Fetcher, autojump_clock: MockClock
) -> None:
    """Read-ahead that fails is not worth retrying; a reader that needs the chunk later asks anew."""
    rig.glance.replies.append(Reply(error=GlanceUnavailable("down")))
    fetcher.want_background([7, 8])
    await wait_all_tasks_blocked()
    await trio.sleep(10)
    assert len(rig.glance.ranges) == 1
    assert await fetcher.fetch([7]) == expected(7)


async def test_reader_that_joins_a_failing_background_flight_is_served(
    rig: ImageRig, fetcher: Fetcher, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """A want that met a background flight is retried when that fails."""
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate, error=GlanceUnavailable("down")))
    fetcher.want_background([7, 8])
    await wait_all_tasks_blocked()
    reader = Reader(nursery, fetcher, 8)
    await wait_all_tasks_blocked()
    gate.set()
    await trio.sleep(1)
    assert reader.got == expected(8)
    assert rig.glance.ranges == [(7 * CHUNK, 9 * CHUNK), (8 * CHUNK, 9 * CHUNK)]


async def test_nobody_open_means_nothing_ahead(cache: CacheDir, nursery: trio.Nursery) -> None:
    """Background wants are dropped with the last handle; what a `prefetch` waits for is kept."""
    rig = ImageRig(cache, nursery, requests_max=1, background_requests_max=1, request_bytes_max=CHUNK)
    fetcher = rig.add(1, SIZE_BYTES).fetcher
    gate = rig.glance.always.gate = trio.Event()
    fetcher.want_background([1, 2, 3])
    waits = Reader(nursery, fetcher, 20, urgent=False)
    await wait_all_tasks_blocked()
    fetcher.abandon_background()
    gate.set()
    await wait_all_tasks_blocked()
    assert waits.got == expected(20)
    assert rig.glance.ranges == [(CHUNK, 2 * CHUNK), (20 * CHUNK, 21 * CHUNK)]
    assert fetcher.statistics().waiting_chunks == 0


# ── a store that cannot take them ──


async def test_full_cache_serves_without_storing(rig: ImageRig, fetcher: Fetcher) -> None:
    """[I1] Where there is no room the reader gets the right bytes; once out of memory they are fetched again."""
    rig.fake_space.has_room = False
    for _ in range(2):
        assert await fetcher.fetch([1, 2]) == expected(1, 2)
    await rig.wait_written()
    assert rig.glance.ranges == [(CHUNK, 3 * CHUNK)]
    rig.unstored.forget(rig.writers[-1])
    assert await fetcher.fetch([1, 2]) == expected(1, 2)
    assert rig.glance.ranges == [(CHUNK, 3 * CHUNK)] * 2
    assert rig.file.absent(range(COUNT)) == list(range(COUNT))


async def test_failing_disk_serves_without_storing(rig: ImageRig, fetcher: Fetcher) -> None:
    """[I1] A write that fails costs the reader nothing; the chunk stays absent and comes again when needed."""
    file = rig.file
    # Writing to a closed file fails as a failing disk does, with OSError.
    file.close()
    assert await fetcher.fetch([1]) == expected(1)
    await rig.wait_written()
    assert len(rig.fake_space.failures) == 1
    rig.unstored.forget(rig.writers[-1])
    assert await fetcher.fetch([1]) == expected(1)
    assert len(rig.glance.ranges) == 2
