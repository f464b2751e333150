"""A read returns exactly the image's bytes, whatever of them is here and whatever the cache disk does."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
import trio
from image_fakes import MIB, ImageRig, Reply
from store_images import content, damage
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import GlanceUnavailable, ReadTimeout
from lazyimg.image.lazyimage import PREFETCH_BYTES, LazyImage
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.index import Index

COUNT = 40
SIZE_BYTES = COUNT * CHUNK - 100
WHOLE = content(1, 0, SIZE_BYTES)
EIO = OSError(errno.EIO, "injected")


@pytest.fixture
def image(rig: ImageRig) -> LazyImage:
    return rig.add(1, SIZE_BYTES)


async def make_present(rig: ImageRig, image: LazyImage, *chunks: int) -> None:
    """Have chunks on file, durably, and nothing else under way."""
    for chunk in chunks:
        await image.fetcher.fetch([chunk])
    await rig.wait_written()
    await image.commit()
    rig.glance.ranges.clear()


def asked_chunks(rig: ImageRig) -> set[int]:
    return {c for start, stop in rig.glance.ranges for c in range(start // CHUNK, -(-stop // CHUNK))}


# ── the bytes ──


@pytest.mark.parametrize(
    ("start", "size_bytes"),
    [
        (0, 1),
        (0, CHUNK),
        (CHUNK - 1, 2),
        (CHUNK + 7, 3 * CHUNK),
        (SIZE_BYTES - 10, 10),
        (SIZE_BYTES - 10, 4096),
        (SIZE_BYTES - CHUNK - 5, 2 * CHUNK),
        (SIZE_BYTES, 4096),
        (SIZE_BYTES + 10 * CHUNK, 4096),
        (5, 0),
    ],
)
async def test_read_returns_exactly_its_range(
    rig: ImageRig, image: LazyImage, start: int, size_bytes: int
) -> None:
    """[I1] Across borders of chunks and up to the image's end, absent or present, a read is the image's bytes."""
    expected = WHOLE[start : start + size_bytes]
    assert await image.read(start, size_bytes) == expected
    await rig.wait_written()
    assert await image.read(start, size_bytes) == expected


async def test_read_of_mixed_presence(rig: ImageRig, image: LazyImage) -> None:
    """[I1] Present chunks come from the file and absent ones from Glance, which is asked for no others."""
    await make_present(rig, image, 3, 4, 6, 39)
    assert await image.read(3 * CHUNK + 5, 5 * CHUNK) == WHOLE[3 * CHUNK + 5 : 8 * CHUNK + 5]
    assert not asked_chunks(rig) & {3, 4, 6}
    assert {5, 7, 8} <= asked_chunks(rig)


async def test_present_bytes_need_no_glance(rig: ImageRig, image: LazyImage) -> None:
    """[I6] What is present is read while Glance fails every request."""
    await make_present(rig, image, *range(COUNT))
    rig.glance.always.error = rig.glance.image_error = GlanceUnavailable("down")
    again = rig.open_again(image)
    assert await again.read(0, SIZE_BYTES) == WHOLE
    assert rig.glance.ranges == []


async def test_read_of_what_is_still_being_written(rig: ImageRig, image: LazyImage) -> None:
    """[I1] Between arrival and write a chunk is read from memory, and not asked for twice."""
    async with rig.write_limiter:
        rig.write_limiter.total_tokens = 1
        for _ in range(2):
            assert await image.read(CHUNK, CHUNK) == WHOLE[CHUNK : 2 * CHUNK]
        asked = len(rig.glance.ranges)
    await rig.wait_written()
    assert asked == 1


async def test_read_fails_with_the_fetchers_error(
    rig: ImageRig, image: LazyImage, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I1] A read that cannot be answered fails, it never returns less or zeros, and the next one may succeed."""
    expected_warnings("trying again in")
    rig.glance.always.error = GlanceUnavailable("down")
    with pytest.raises(ReadTimeout):
        await image.read(0, 4096)
    rig.glance.always.error = None
    assert await image.read(0, 4096) == WHOLE[:4096]


# ── a cache disk that fails ──


async def test_damaged_chunk_is_fetched_again(
    rig: ImageRig, image: LazyImage, expected_warnings: Callable[..., None]
) -> None:
    """[I1] A flipped bit on disk is found and fetched again, its neighbours are kept, the kernel's pages are not."""
    expected_warnings("damaged chunks dropped")
    await make_present(rig, image, 1, 2, 3)
    damage(rig.file.path, 2)
    again = rig.open_again(image)
    assert await again.read(CHUNK, 3 * CHUNK) == WHOLE[CHUNK : 4 * CHUNK]
    assert asked_chunks(rig) & {1, 2, 3} == {2}
    assert rig.forgotten == [again.inode]
    await rig.wait_written()
    assert await again.read(CHUNK, 3 * CHUNK) == WHOLE[CHUNK : 4 * CHUNK]


async def test_hole_punched_by_somebody_is_no_zeros(
    rig: ImageRig, image: LazyImage, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Bytes that are gone from the file though the index has them are fetched, not read as zeros."""
    expected_warnings("damaged chunks dropped")
    await make_present(rig, image, 1)
    rig.file.path.write_bytes(bytes(SIZE_BYTES))
    again = rig.open_again(image)
    assert await again.read(CHUNK, CHUNK) == WHOLE[CHUNK : 2 * CHUNK]


async def test_disk_that_cannot_be_read_is_done_without(
    rig: ImageRig, image: LazyImage, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Every read of the cache disk fails with EIO: the image's bytes come from Glance."""
    expected_warnings("used on and watched")
    await make_present(rig, image, 1, 2)
    again = rig.open_again(image)
    monkeypatch.setattr("lazyimg.store.chunkfile.os.pread", _fail)
    monkeypatch.setattr("lazyimg.store.chunkfile.os.preadv", _fail)
    assert await again.read(CHUNK, 2 * CHUNK) == WHOLE[CHUNK : 3 * CHUNK]


async def test_index_that_cannot_be_read_is_done_without(
    rig: ImageRig, image: LazyImage, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Where presence cannot be found out, everything counts as absent and comes from Glance."""
    expected_warnings("is not known")
    await make_present(rig, image, 1, 2)
    again = rig.open_again(image)
    monkeypatch.setattr(Index, "page", _fail)
    with trio.fail_after(60):
        assert await again.read(CHUNK, 2 * CHUNK) == WHOLE[CHUNK : 3 * CHUNK]


async def test_disk_that_takes_no_writes_is_done_without(
    rig: ImageRig, image: LazyImage, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Every write fails: reads are served, again and again."""
    expected_warnings("used on and watched")
    # As many writes fail as the store happened to be asked for.
    expected_warnings("not used from here on", required=False)
    monkeypatch.setattr("lazyimg.store.chunkfile.os.pwritev", _fail)
    for _ in range(2):
        assert await image.read(0, 2 * CHUNK) == WHOLE[: 2 * CHUNK]
        await rig.wait_written()
    assert image.present_bytes == 0
    assert rig.disk.statistics().errors


async def test_sync_that_fails_costs_presence_alone(
    rig: ImageRig, image: LazyImage, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """[I2] Chunks whose write-back failed are absent again, and fetched when they are read."""
    expected_warnings("failed to sync", "used on and watched")
    assert await image.read(0, CHUNK) == WHOLE[:CHUNK]
    await rig.wait_written()
    with monkeypatch.context() as patch:
        patch.setattr("lazyimg.store.chunkfile.os.fdatasync", _fail)
        await image.commit()
    assert image.present_bytes == 0
    assert await image.read(0, CHUNK) == WHOLE[:CHUNK]


def _fail(*_: object) -> None:
    raise EIO


# ── without waiting ──


async def test_read_nowait_answers_only_what_is_at_hand(rig: ImageRig, image: LazyImage) -> None:
    """Present bytes are read without a thread; absent ones are not waited for."""
    assert image.read_nowait(0, 4096) is None
    await make_present(rig, image, 0, 39)
    assert bytes(image.read_nowait(10, 4096) or b"") == WHOLE[10:4106]
    assert bytes(image.read_nowait(SIZE_BYTES - 5, 4096) or b"") == WHOLE[-5:]
    assert image.read_nowait(SIZE_BYTES, 4096) == b""
    assert image.read_nowait(CHUNK - 5, 10) is None


async def test_dropped_image_is_not_read(rig: ImageRig, image: LazyImage, mock_clock: MockClock) -> None:
    """[I1] Once dropped, its descriptor may be another file's: nothing is read by it any more, nobody waits."""
    await make_present(rig, image, *range(COUNT))
    assert image.read_nowait(0, 4096) is not None
    image.drop()
    rig.cache.close_image(image.record.key("stored"))
    assert image.read_nowait(0, 4096) is None
    with pytest.raises(GlanceUnavailable, match="dropped"):
        await image.read(0, 4096)


async def test_sequence_of_hits_is_kept_ahead_of(rig: ImageRig, image: LazyImage) -> None:
    """A sequential reader that finds its bytes present has the next ones fetched before it gets there."""
    await make_present(rig, image, *range(8))
    for start in range(0, 8 * CHUNK, CHUNK):
        assert image.read_nowait(start, CHUNK) is not None
    await wait_all_tasks_blocked()
    assert 8 in asked_chunks(rig)


async def test_random_hits_fetch_nothing(rig: ImageRig, image: LazyImage) -> None:
    """A hit that belongs to no sequence says nothing of what is next."""
    await make_present(rig, image, 0, 15, 30)
    for chunk in (30, 0, 15):
        assert image.read_nowait(chunk * CHUNK + 4096, 512) is not None
    await wait_all_tasks_blocked()
    assert rig.glance.ranges == []


async def test_miss_fetches_its_window_in_one_request(rig: ImageRig, image: LazyImage) -> None:
    """A random read asks for 256 KiB, up to the first chunk that is here; the read waits for its own part alone."""
    await make_present(rig, image, 13)
    rig.glance.replies.append(reply := Reply(hold_at_bytes=CHUNK + 1))
    assert await image.read(20 * CHUNK, 4096) == WHOLE[20 * CHUNK :][:4096]
    assert rig.glance.ranges == [(20 * CHUNK, 24 * CHUNK)]
    reply.resume.set()
    assert await image.read(11 * CHUNK, 4096) == WHOLE[11 * CHUNK :][:4096]
    assert rig.glance.ranges[1:] == [(11 * CHUNK, 13 * CHUNK)]


async def test_last_handle_ends_what_is_fetched_ahead(cache: CacheDir, nursery: trio.Nursery) -> None:
    """Closed for the last time, an image wants nothing more in the background."""
    rig = ImageRig(cache, nursery, requests_max=1, background_requests_max=1, request_bytes_max=CHUNK)
    image = rig.add(1, SIZE_BYTES)
    gate = rig.glance.always.gate = trio.Event()
    image.opened()
    image.opened()
    image.fetcher.want_background([1, 5, 9])
    await wait_all_tasks_blocked()
    image.closed()
    assert image.open_handles == 1
    image.closed()
    gate.set()
    await wait_all_tasks_blocked()
    assert rig.glance.ranges == [(CHUNK, 2 * CHUNK)]
    assert image.open_handles == 0


# ── the whole of it ──


@pytest.mark.slow
async def test_prefetch_brings_everything_and_tells_how_far(rig: ImageRig) -> None:
    """Prefetch yields its progress in bytes, fetches only what is absent, and then the image is whole."""
    size_bytes = PREFETCH_BYTES + 3 * CHUNK + 5
    image = rig.add(2, size_bytes)
    await make_present(rig, image, 2, 3)
    assert [done async for done in image.prefetch()] == [PREFETCH_BYTES, size_bytes]
    assert image.is_whole
    assert image.present_bytes == size_bytes
    assert not asked_chunks(rig) & {2, 3}
    assert rig.glance.out_max <= 2
    assert await image.read(PREFETCH_BYTES - 9, 4096) == content(2, PREFETCH_BYTES - 9, PREFETCH_BYTES + 4087)


async def test_statistics_are_those_of_now(rig: ImageRig, image: LazyImage) -> None:
    """A snapshot counts what is present, open and fetched; unsynced writes are told."""
    image.opened()
    await image.read(0, CHUNK)
    await wait_all_tasks_blocked()
    await rig.wait_written()
    now = image.statistics()
    assert (now.present_bytes, now.open_handles, now.fetch.requests) == (4 * CHUNK, 1, 1)
    assert now.fetch.fetched_bytes == 4 * CHUNK
    assert image.is_dirty
    await image.commit()
    assert not image.is_dirty


@pytest.mark.parametrize(
    ("changes", "source_hash"),
    [
        ({}, "match"),
        ({"os_hash_value": "00" * 64}, "mismatch"),
        ({"os_hash_value": None}, "unknown"),
        ({"os_hash_algo": "sha0815"}, "unknown"),
    ],
)
async def test_verify_checks_the_sources_hash(
    rig: ImageRig, changes: dict[str, object], source_hash: str
) -> None:
    """A whole image is compared with the hash Glance has of it, where it has one that is known here."""
    image = rig.add(1, 5 * CHUNK + 3, **changes)
    await make_present(rig, image, *range(6))
    steps: list[tuple[int, int]] = []
    assert await image.verify(lambda done, total: steps.append((done, total))) == (0, source_hash)
    assert steps
    assert all(done <= total for done, total in steps)


async def test_verify_of_a_part_knows_no_hash(rig: ImageRig, image: LazyImage) -> None:
    """What is not wholly here cannot be compared with the source's hash."""
    await make_present(rig, image, 1, 2)
    assert await image.verify(lambda done, total: None) == (0, "unknown")


async def test_verify_drops_what_is_damaged(rig: ImageRig, expected_warnings: Callable[..., None]) -> None:
    """[I1] Damage is counted and dropped, so that the next read fetches it."""
    expected_warnings("damaged chunks dropped")
    image = rig.add(1, 5 * CHUNK)
    await make_present(rig, image, *range(5))
    damage(rig.file.path, 1)
    damage(rig.file.path, 4)
    assert await image.verify(lambda done, total: None) == (2, "unknown")
    assert rig.forgotten == [image.inode]
    assert not image.is_whole
    assert await image.read(0, 5 * CHUNK) == content(1, 0, 5 * CHUNK)


async def test_verify_can_be_cancelled(rig: ImageRig) -> None:
    """A client that goes away ends the check at its next step."""
    image = rig.add(1, 2 * MIB)
    await make_present(rig, image, *range(32))
    with trio.CancelScope() as scope:
        await image.verify(lambda done, total: scope.cancel())
    assert scope.cancelled_caught
