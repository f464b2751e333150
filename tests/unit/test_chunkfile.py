"""One chunk file: what is present, what is proven, and what a read may return."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from store_images import chunks_content, content, damage, image_entry, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ChunkAbsent, ChunkDamaged
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile
from lazyimg.store.index import PAGE_CHUNKS

SIZE_BYTES = 10 * CHUNK + 5
KEY = image_entry(1, SIZE_BYTES).key


@pytest.fixture
def file(cache: CacheDir) -> ChunkFile:
    return open_new(cache, 1, SIZE_BYTES)


def write(file: ChunkFile, first: int, count: int) -> None:
    file.write(first, chunks_content(1, first, count, file.size_bytes))


def reopen(cache: CacheDir, *, damaged: tuple[int, ...] = ()) -> ChunkFile:
    cache.close_image(KEY)
    for chunk in damaged:
        damage(next(cache.path.glob("chunks/*")), chunk)
    return cache.open_image(KEY)


def test_new_file_is_sparse_and_absent(file: ChunkFile) -> None:
    """A new file has the presented size, takes no room and has no chunk."""
    assert (file.path.stat().st_size, file.allocated_bytes) == (SIZE_BYTES, 0)
    assert (file.chunk_count, file.present_count, file.is_whole) == (11, 0, False)
    assert file.absent(range(11)) == list(range(11))


def test_absent_chunk_is_never_read_as_zeros(file: ChunkFile) -> None:
    """Invariant 1: a read that touches an absent chunk names it and returns nothing."""
    write(file, 0, 3)
    with pytest.raises(ChunkAbsent) as caught:
        file.read(2 * CHUNK, 5 * CHUNK)
    assert caught.value.chunks == [3, 4]
    assert file.read_nowait(2 * CHUNK, 5 * CHUNK) is None


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 1), (CHUNK - 1, CHUNK + 1), (3, SIZE_BYTES), (SIZE_BYTES - 1, SIZE_BYTES), (10 * CHUNK, SIZE_BYTES)],
)
def test_written_bytes_are_read_at_every_stage(
    cache: CacheDir, file: ChunkFile, start: int, stop: int
) -> None:
    """What was written is read the same before commit, after it, and after the file was opened again."""
    write(file, 0, 11)
    expected = content(1, start, stop)
    assert file.read(start, stop) == file.read_nowait(start, stop) == expected
    assert file.commit() == 11
    assert file.read(start, stop) == file.read_nowait(start, stop) == expected
    file = reopen(cache)
    assert file.is_whole
    # Not proven yet in this process: a thread must check it first.
    assert file.read_nowait(start, stop) is None
    assert file.read(start, stop) == file.read_nowait(start, stop) == expected


def test_uncommitted_chunks_are_absent_when_opened_again(cache: CacheDir, file: ChunkFile) -> None:
    """Only what was committed counts after the file was closed."""
    write(file, 0, 2)
    file.commit()
    write(file, 2, 2)
    assert (file.present_count, file.written_count) == (4, 2)
    file = reopen(cache)
    assert file.absent(range(5)) == [2, 3, 4]
    assert (file.present_count, file.written_count) == (2, 0)


def test_absent_nowait_asks_for_a_thread_until_the_page_is_loaded(cache: CacheDir, file: ChunkFile) -> None:
    """Presence not in memory is None without blocking, and known once a thread asked."""
    write(file, 1, 1)
    file.commit()
    file = reopen(cache)
    assert file.absent_nowait(range(3)) is None
    assert file.absent(range(3)) == [0, 2]
    assert file.absent_nowait(range(3)) == [0, 2]
    assert file.absent_nowait(range(0)) == []


def test_damaged_chunk_is_dropped_for_good(
    cache: CacheDir, file: ChunkFile, expected_warnings: Callable[..., None]
) -> None:
    """A chunk whose bytes changed is named, stays absent over a restart, and can be stored again."""
    expected_warnings("1 damaged chunks dropped, from 4")
    write(file, 0, 11)
    file.commit()
    file = reopen(cache, damaged=(4,))
    with pytest.raises(ChunkDamaged) as caught:
        file.read(3 * CHUNK, 6 * CHUNK)
    assert caught.value.chunks == [4]
    assert file.absent(range(11)) == [4]
    file = reopen(cache)
    assert file.absent(range(11)) == [4]
    write(file, 4, 1)
    assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


def test_write_leaves_present_chunks_as_they_are(file: ChunkFile) -> None:
    """A second writer of a chunk changes nothing: neither bytes under a reader nor the count."""
    write(file, 0, 2)
    file.write(0, [bytes(CHUNK), bytes(CHUNK), *chunks_content(1, 2, 1, SIZE_BYTES)])
    assert file.present_count == 3
    assert file.read(0, 3 * CHUNK) == content(1, 0, 3 * CHUNK)


def test_chunk_of_wrong_length_is_refused(file: ChunkFile) -> None:
    """A piece that is not a whole chunk is our own mistake and reaches no disk."""
    with pytest.raises(AssertionError):
        file.write(10, [bytes(CHUNK)])
    with pytest.raises(AssertionError):
        file.write(0, [bytes(CHUNK - 1)])
    assert file.present_count == 0


def test_drop_makes_chunks_absent_durably(cache: CacheDir, file: ChunkFile) -> None:
    """Dropped chunks are absent at once and after a restart, whether they were committed or not."""
    write(file, 0, 2)
    file.commit()
    write(file, 2, 2)
    file.drop([1, 2])
    assert (file.absent(range(4)), file.present_count) == ([1, 2], 2)
    file.commit()
    assert reopen(cache).absent(range(4)) == [1, 2]


def test_verify_finds_every_damaged_chunk(
    cache: CacheDir, file: ChunkFile, expected_warnings: Callable[..., None]
) -> None:
    """Verify checks all present chunks, or some, and drops the damaged ones."""
    expected_warnings("damaged chunks dropped")
    write(file, 0, 9)
    file.commit()
    file = reopen(cache, damaged=(2, 8))
    assert file.verify(range(3)) == (3, [2])
    assert file.verify() == (8, [8])
    assert file.verify() == (7, [])
    assert file.read_nowait(0, 2 * CHUNK) == content(1, 0, 2 * CHUNK)


def test_image_of_no_bytes_is_whole(cache: CacheDir) -> None:
    """An empty image has no chunks and lacks none."""
    file = open_new(cache, 2, 0)
    assert (file.is_whole, file.read(0, 0), file.commit()) == (True, b"", 0)


def test_reads_cross_pages_of_presence(cache: CacheDir) -> None:
    """A range over the end of a page of checksums is read like any other."""
    size_bytes = (PAGE_CHUNKS + 2) * CHUNK
    file = open_new(cache, 3, size_bytes)
    first, count = PAGE_CHUNKS - 2, 4
    file.write(first, chunks_content(3, first, count, size_bytes))
    file.commit()
    start, stop = first * CHUNK + 1, size_bytes - 1
    assert file.read(start, stop) == content(3, start, stop)
    assert file.absent_nowait(range(first - 1, first + count)) == [first - 1]
    cache.close_image(file.key)
    file = cache.open_image(file.key)
    assert file.read(start, stop) == content(3, start, stop)


def test_pages_in_memory_are_bounded(tmp_path: Path) -> None:
    """Invariant 5: only `pages_max` pages of presence are in memory; others are loaded when asked for."""
    cache = CacheDir(tmp_path / "cache", pages_max=2)
    size_bytes = 5 * PAGE_CHUNKS * CHUNK
    file = open_new(cache, 4, size_bytes)
    chunks = range(0, file.chunk_count, PAGE_CHUNKS)
    for chunk in chunks:
        file.write(chunk, chunks_content(4, chunk, 1, size_bytes))
    for _ in range(2):
        assert [len(file.absent(range(chunk, chunk + 2))) for chunk in chunks] == [1] * 5
        assert sum(file.absent_nowait(range(chunk, chunk + 1)) is not None for chunk in chunks) == 2
        file.commit()
    for chunk in chunks:
        assert file.read(chunk * CHUNK, chunk * CHUNK + 9) == content(4, chunk * CHUNK, chunk * CHUNK + 9)
    cache.close()


def test_closed_file_reads_nothing(file: ChunkFile) -> None:
    """After close its descriptor number may belong to another file, and is not used."""
    write(file, 0, 1)
    file.close()
    file.close()
    with pytest.raises(OSError, match="closed") as caught:
        file.read(0, 1)
    assert caught.value.errno == errno.EBADF
    assert file.read_nowait(0, 1) is None


def test_large_write_is_split_at_the_kernels_limit(cache: CacheDir) -> None:
    """More chunks than one pwritev takes are all written."""
    size_bytes = 1030 * CHUNK
    file = open_new(cache, 5, size_bytes)
    chunk = os.urandom(CHUNK)
    file.write(0, [chunk] * 1030)
    assert file.is_whole
    assert file.read(1020 * CHUNK, size_bytes) == chunk * 10
