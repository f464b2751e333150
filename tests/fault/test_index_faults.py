"""Every way the index can be spoiled, removed or out of reach: the sidecars prove again what it proved."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from faulty_disk import FaultyDisk
from spoiled_cache import COUNT, SIZE_BYTES, WHOLE, check_and_refill, fill, opened, write
from store_images import chunks_content, content, damage, image_entry, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_range
from lazyimg.errors import ChunkDamaged
from lazyimg.store.cachedir import CacheDir, CacheStatistics
from lazyimg.store.index import PAGE_CHUNKS, Index


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def _truncate_to(length: int) -> Callable[[Path], None]:
    return lambda index: os.truncate(index / "cache.db", length)


def _garbage(index: Path) -> None:
    (index / "cache.db").write_bytes(random.Random(1).randbytes(40_000))


def _no_tables(index: Path) -> None:
    (index / "cache.db").unlink()
    with contextlib.closing(sqlite3.connect(index / "cache.db")) as database:
        database.execute("CREATE TABLE other (one)")


def _no_list_of_images(index: Path) -> None:
    with contextlib.closing(sqlite3.connect(index / "cache.db", isolation_level=None)) as database:
        database.execute("UPDATE Cache SET value = 'not json' WHERE key = 'images'")


def _other_journal(index: Path) -> None:
    (index / "cache.db-wal").write_bytes(random.Random(2).randbytes(40_000))


@pytest.mark.parametrize(
    "spoil",
    [
        *(
            pytest.param(_truncate_to(length), id=f"cut to {length}")
            for length in (0, 1, 50, 100, 4096, 20_000)
        ),
        _garbage,
        _no_tables,
        _no_list_of_images,
        _other_journal,
        shutil.rmtree,
    ],
)
def test_spoiled_index_is_never_in_the_way(
    path: Path, spoil: Callable[[Path], None], expected_warnings: Callable[..., None]
) -> None:
    """Whatever became of the index, the cache opens, and its sidecars prove again what it proved."""
    expected_warnings(
        "cache index set aside", "cache index rebuilt from sidecars: 1 images, 16", required=False
    )
    fill(path)
    spoil(path / "index")
    with opened(path) as (_, file):
        assert file.read(0, SIZE_BYTES) == WHOLE
        check_and_refill(file)
        assert list((path / "chunks").iterdir()) == [file.path]
    with opened(path) as (_, file):
        assert file.read(0, SIZE_BYTES) == WHOLE


@pytest.mark.parametrize("left", [0.3, 0.6, 0.9])
def test_index_cut_short_beside_its_log_is_found_at_the_next_start(
    path: Path, tmp_path: Path, left: float, expected_warnings: Callable[..., None]
) -> None:
    """SQLite believes the log that a killed daemon left of how long the file is, and misses the rest later."""
    expected_warnings("cache index set aside: .*cut short", "cache index rebuilt from sidecars: 1 images, 16")
    fill(path)
    database = path / "index" / "cache.db"
    killed = tmp_path / "killed"
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE other (one)")
        connection.execute("INSERT INTO other VALUES (randomblob(200000))")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("CREATE TABLE another (one)")
        shutil.copytree(path, killed)
    cut = killed / "index" / "cache.db"
    os.truncate(cut, int(cut.stat().st_size * left) // 4096 * 4096)
    with opened(killed) as (_, file):
        assert file.read(0, SIZE_BYTES) == WHOLE
        check_and_refill(file)


def test_index_that_could_not_be_read_for_a_moment_is_kept(faulty_disk: FaultyDisk) -> None:
    """SQLite calls its file corrupt when one read of it fails; the next start finds it whole and keeps all."""
    path = faulty_disk.path / "index"
    index, entry = Index(path), image_entry(2, 1 << 36)
    index.put(entry)
    index.begin(entry.key, "ab" * 8)
    sums = {page: [page + 1] * PAGE_CHUNKS for page in range(20)}
    index.commit(entry.key, "ab" * 8, sums, 7)
    index.close()
    index = Index(path)
    faulty_disk.strike("read", path="index/*", error=errno.EIO, count=1)
    with pytest.raises(OSError, match="malformed"):
        index.page(entry.key, "ab" * 8, 11)
    index.close()
    assert (path / "damaged").exists()
    index = Index(path)
    assert index.page(entry.key, "ab" * 8, 11) == tuple(sums[11])
    assert not (path / "damaged").exists()
    index.close()


def test_index_found_corrupt_while_in_use_is_set_aside_at_the_next_start(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """Pages that SQLite cannot read are absent, not an error; the next start builds a new index of the sidecars."""
    expected_warnings(
        "is not known: .*malformed", "cache index set aside", "rebuilt from sidecars: 1 images, 100"
    )
    pages = 100
    size_bytes = pages * PAGE_CHUNKS * CHUNK
    cache = CacheDir(path)
    file = open_new(cache, 2, size_bytes)
    for page in range(pages):
        file.write(page * PAGE_CHUNKS, chunks_content(2, page * PAGE_CHUNKS, 1, size_bytes))
    file.commit()
    cache.close()
    database = path / "index" / "cache.db"
    with database.open("r+b") as hand:
        # Past the entries and lists at its beginning, before the latest of what was changed at its end.
        hand.seek(database.stat().st_size // 5)
        hand.write(bytes([0xA5]) * (database.stat().st_size // 10))
    cache = CacheDir(path)
    file = cache.open_image(file.key)
    for chunk in range(0, file.chunk_count, PAGE_CHUNKS):
        start, stop = chunk_range(chunk, size_bytes)
        if not file.absent(range(chunk, chunk + 1)):
            assert file.read(start, stop) == content(2, start, stop)
        file.write(chunk, chunks_content(2, chunk, 1, size_bytes))
        assert file.read(start, stop) == content(2, start, stop)
    cache.close()
    cache = CacheDir(path)
    assert cache.open_image(file.key).present_count == pages
    assert cache.statistics() == CacheStatistics(
        damaged_chunks=0, rebuilt_images=1, set_aside=1, removed_files=0
    )
    cache.close()


def test_index_removed_under_a_running_daemon_costs_no_read(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """Threads that find the index gone fail their commits, not their reads; the next start rebuilds it."""
    expected_warnings("cache index rebuilt from sidecars: 1 images, 3 chunks")
    with opened(path) as (_, file), ThreadPoolExecutor(1) as thread:
        write(file, 0, 3)
        file.commit()
        shutil.rmtree(path / "index")
        # A thread that was not there before has no connection yet.
        thread.submit(write, file, 3, 1).result()
        with pytest.raises(OSError, match="cache index"):
            thread.submit(file.commit).result()
        assert thread.submit(file.read, 0, 4 * CHUNK).result() == content(1, 0, 4 * CHUNK)
    with opened(path) as (_, file):
        assert file.absent(range(5)) == [3, 4]
        check_and_refill(file)


def test_failing_index_proves_nothing_anew(path: Path, expected_warnings: Callable[..., None]) -> None:
    """[I1] While the index cannot be read, what is proven or just written is served, and nothing else."""
    expected_warnings("damaged chunks dropped", "cannot record")
    fill(path)
    with opened(path) as (cache, file):
        file.drop([2])
        file.read(0, 2 * CHUNK)
        write(file, 2, 1)
        with mock.patch.object(cache.index, "page", side_effect=OSError(errno.EIO, "injected")):
            assert file.read(0, 3 * CHUNK) == content(1, 0, 3 * CHUNK)
            with pytest.raises(OSError, match="injected"):
                file.read(0, 4 * CHUNK)
            assert file.absent(range(4)) == []
            os.truncate(file.path, CHUNK + 5)
            with pytest.raises(ChunkDamaged) as cut:
                file.read(0, 3 * CHUNK)
            assert cut.value.chunks == [1, 2]
        assert file.read(0, CHUNK) == content(1, 0, CHUNK)


def test_damage_that_cannot_be_recorded_is_still_damage(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """While the index cannot be written a damaged chunk is absent in memory, and can be stored again."""
    expected_warnings("cannot record that chunks are damaged", "damaged chunks dropped")
    damage(fill(path), 3)
    with opened(path) as (cache, file):
        cache.index.close()
        # A lock held by somebody else; SQLite's wait for it is cut from a minute.
        cache.index._cache._timeout = 0.01
        with contextlib.closing(sqlite3.connect(path / "index" / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(ChunkDamaged):
                file.read(0, SIZE_BYTES)
            assert file.absent(range(COUNT)) == [3]
            write(file, 3, 1)
            assert (file.read(0, SIZE_BYTES), file.present_count) == (WHOLE, COUNT)
            with pytest.raises(OSError, match="cache index"):
                file.commit()
            other.execute("ROLLBACK")
        assert (file.commit(), file.present_count) == (1, COUNT)
    with opened(path) as (_, file):
        assert file.read(0, SIZE_BYTES) == WHOLE


def test_connection_left_in_a_transaction_fails_once(path: Path) -> None:
    """A commit that failed half way leaves SQLite in a transaction; one call later all is well."""
    with opened(path) as (cache, file):
        write(file, 0, 1)
        cache.index._cache._sql("BEGIN IMMEDIATE")
        with pytest.raises(OSError, match="cache index"):
            file.commit()
        assert file.commit() == 1
