"""Every way a disk, a crash or somebody's hand can spoil the cache.

Expected each time: a read returns the image's bytes or says which chunks it lacks, the cache opens, and what
was lost can be stored again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from faulty_disk import FaultyDisk
from store_images import chunks_content, content, damage, image_entry, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_range
from lazyimg.errors import CacheUnusable, ChunkAbsent, ChunkDamaged, ChunkUnreadable
from lazyimg.store.cachedir import CacheDir, CacheStatistics
from lazyimg.store.chunkfile import ChunkFile
from lazyimg.store.index import PAGE_CHUNKS, Index

COUNT = 16
SIZE_BYTES = COUNT * CHUNK - 9
KEY = image_entry(1, SIZE_BYTES).key
WHOLE = content(1, 0, SIZE_BYTES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def small_disk(tmp_path: Path, require: Callable[..., None]) -> Iterator[Path]:
    """A file system of 2 MiB."""
    require("mount", "umount")
    if os.geteuid() != 0:
        pytest.skip("root is missing here: a small file system cannot be mounted")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[CacheDir, ChunkFile]]:
    """The cache and its one image, made known where it is not."""
    cache = CacheDir(path)
    try:
        yield cache, cache.open_image(KEY) if cache.index.get(KEY) else open_new(cache, 1, SIZE_BYTES)
    finally:
        cache.close()


def write(file: ChunkFile, first: int, count: int) -> None:
    file.write(first, chunks_content(1, first, count, SIZE_BYTES))


def fill(path: Path) -> Path:
    """Store the whole image and close the cache; return the chunk file."""
    with opened(path) as (_, file):
        write(file, 0, COUNT)
        file.commit()
        return file.path


def check_and_refill(file: ChunkFile) -> None:
    """Each present chunk has the image's bytes; the others can be stored and all is right again."""
    for chunk in range(COUNT):
        with contextlib.suppress(ChunkAbsent, ChunkDamaged):
            assert file.read(*chunk_range(chunk, SIZE_BYTES)) == content(1, *chunk_range(chunk, SIZE_BYTES))
    write(file, 0, COUNT)
    assert file.read(0, SIZE_BYTES) == WHOLE
    file.commit()
    assert file.is_whole


# ── the disk is full ──


def test_full_disk_leaves_chunks_absent_and_the_rest_readable(small_disk: Path) -> None:
    """ENOSPC reaches the caller; what was stored before is served, and space that comes back is used."""
    ballast = small_disk / "ballast"
    with opened(small_disk / "cache") as (_, file):
        write(file, 0, 2)
        file.commit()
        with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left") as caught:
            write(file, 2, COUNT - 2)
        assert caught.value.errno == errno.ENOSPC
        assert file.absent(range(COUNT)) == list(range(2, COUNT))
        assert file.read(0, 2 * CHUNK) == content(1, 0, 2 * CHUNK)
        ballast.unlink()
        check_and_refill(file)


def test_full_disk_fails_the_commit_and_keeps_the_chunks_for_the_next(small_disk: Path) -> None:
    """An index that cannot grow fails the commit; its chunks are served and committed later."""
    ballast = small_disk / "ballast"
    with opened(small_disk / "cache") as (cache, file):
        write(file, 0, 2)
        with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="cache index") as caught:
            file.commit()
        assert caught.value.errno == errno.ENOSPC
        assert file.written_count == 2
        assert file.read(0, 2 * CHUNK) == content(1, 0, 2 * CHUNK)
        ballast.unlink()
        file.commit()
        cache.close_image(KEY)
        assert cache.open_image(KEY).absent(range(3)) == [2]


def test_cache_on_a_full_disk_is_refused_in_one_line(small_disk: Path) -> None:
    """A new cache that has no room is refused with the reason, and opens once there is room."""
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(CacheUnusable, match="make it usable or give another"):
        CacheDir(small_disk / "cache")
    ballast.unlink()
    with opened(small_disk / "cache") as (_, file):
        check_and_refill(file)


def test_write_that_is_cut_short_leaves_no_half_chunk(path: Path) -> None:
    """A limit in the middle of a chunk fails the write, and none of its chunks is taken for present."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(path) as (_, file):
        write(file, 0, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * CHUNK + 1000, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                write(file, 1, COUNT - 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert file.absent(range(COUNT)) == list(range(1, COUNT))
        check_and_refill(file)


# ── the disk fails ──


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], contextlib.AbstractContextManager[object]]:
    """Return `failing(name)`: within it os.<name> fails with EIO, as a dying disk's would."""
    return lambda name: mock.patch.object(os, name, side_effect=OSError(errno.EIO, "injected"))


def test_failed_sync_makes_its_chunks_absent(
    path: Path, failing: Callable[[str], contextlib.AbstractContextManager[object]]
) -> None:
    """Invariant 2: bytes that fdatasync could not vouch for do not count, now or after a restart."""
    with opened(path) as (_, file):
        write(file, 0, 2)
        file.commit()
        write(file, 2, 3)
        with failing("fdatasync"), pytest.raises(OSError, match="injected"):
            file.commit()
        assert file.absent(range(6)) == [2, 3, 4, 5]
        assert (file.present_count, file.commit()) == (2, 0)
    with opened(path) as (_, file):
        assert file.absent(range(3)) == [2]
        check_and_refill(file)


def test_unreadable_chunk_stays_until_it_is_dropped(
    path: Path, failing: Callable[[str], contextlib.AbstractContextManager[object]]
) -> None:
    """A chunk that the disk cannot read, proven or not, may be readable later: it is given up only when told to."""
    fill(path)
    with opened(path) as (_, file):
        file.read(0, CHUNK)
        for chunk in (0, 1):
            with failing("pread"), failing("preadv"):
                assert file.read_nowait(chunk * CHUNK, chunk * CHUNK + 9) is None
                with pytest.raises(ChunkUnreadable) as caught:
                    file.read(chunk * CHUNK, chunk * CHUNK + 9)
            assert caught.value.chunks == [chunk]
            assert file.read(chunk * CHUNK, chunk * CHUNK + 9) == WHOLE[chunk * CHUNK :][:9]
        assert file.absent(range(3)) == []
        file.drop([0, 1])
        check_and_refill(file)


def test_bytes_lost_before_their_commit_are_never_returned(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """Invariant 1: the kernel may lose a page before the commit; the zeros beneath are never read."""
    expected_warnings("2 damaged chunks dropped")
    with opened(path) as (_, file):
        write(file, 0, 3)
        assert file.read_nowait(0, 3 * CHUNK) == content(1, 0, 3 * CHUNK)
        with file.path.open("r+b") as hand:
            hand.write(bytes(2 * CHUNK))
        assert file.read_nowait(0, 9) is None
        with pytest.raises(ChunkDamaged) as caught:
            file.read(0, 3 * CHUNK)
        assert caught.value.chunks == [0, 1]
        check_and_refill(file)


# ── the index is spoiled ──


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


# ── somebody's hand ──


def test_file_cut_short_under_a_reader_returns_no_short_read(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """A chunk file that shrinks while open is damaged where it ends, proven or not."""
    expected_warnings("damaged chunks dropped")
    with opened(path) as (_, file):
        write(file, 0, COUNT)
        file.commit()
        os.truncate(file.path, 5 * CHUNK + 1)
        assert file.read_nowait(5 * CHUNK, 6 * CHUNK) is None
        with pytest.raises(ChunkDamaged) as caught:
            file.read(5 * CHUNK, 7 * CHUNK)
        assert caught.value.chunks == [5, 6]
        checked, damaged = file.verify()
        assert (checked, damaged) == (COUNT - 2, list(range(7, COUNT)))
        check_and_refill(file)


def test_bytes_of_another_image_are_never_returned(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """Invariant 1: another image's chunk file copied over this one's, same name and size, is all damaged."""
    expected_warnings("damaged chunks dropped")
    mine = fill(path)
    cache = CacheDir(path)
    other = open_new(cache, 2, SIZE_BYTES)
    other.write(0, chunks_content(2, 0, COUNT, SIZE_BYTES))
    other.commit()
    cache.close()
    shutil.copy(other.path, mine)
    with opened(path) as (_, file):
        assert file.path == mine
        with pytest.raises(ChunkDamaged) as caught:
            file.read(0, SIZE_BYTES)
        assert caught.value.chunks == list(range(COUNT))
        check_and_refill(file)


# ── killed ──

WRITER = """
import random, sys
from pathlib import Path
from store_images import chunks_content, open_new
from lazyimg.store.cachedir import CacheDir, CacheStatistics

path, size_bytes, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
cache = CacheDir(path)
key = cache.index.entries()[0].key
file = cache.open_image(key)
print("ready", flush=True)
while True:
    for _ in range(rng.randrange(1, 5)):
        first = rng.randrange(file.chunk_count - 3)
        file.write(first, chunks_content(1, first, 3, size_bytes))
    if rng.random() < 0.3:
        dropped = rng.randrange(file.chunk_count)
        print("dropping", dropped, flush=True)
        file.drop([dropped])
    file.commit()
    absent = set(file.absent(range(file.chunk_count)))
    print("committed", *(chunk for chunk in range(file.chunk_count) if chunk not in absent), flush=True)
"""


@pytest.mark.slow
def test_killed_writer_leaves_only_right_bytes(path: Path) -> None:
    """Invariant 9: after kill -9 at any moment what was committed is present and what is present is right.

    Ten rounds on one cache: open, write, drop and commit at random, killed after 0 to 0.2 s.
    """
    count = 3 * PAGE_CHUNKS
    size_bytes = count * CHUNK - 5
    cache = CacheDir(path)
    open_new(cache, 1, size_bytes)
    cache.close()
    rng = random.Random(2)
    committed: set[int] = set()
    for seed in range(10):
        committed = _write_until_killed(path, size_bytes, seed, rng.uniform(0, 0.2), committed)
        cache = CacheDir(path)
        file = cache.open_image(cache.index.entries()[0].key)
        absent = set(file.absent(range(count)))
        assert not absent & committed
        for chunk in set(range(count)) - absent:
            start, stop = chunk_range(chunk, size_bytes)
            assert file.read(start, stop) == content(1, start, stop)
        cache.close()
    assert committed


def _write_until_killed(
    path: Path, size_bytes: int, seed: int, after_s: float, committed: set[int]
) -> set[int]:
    """Return the chunks that must be present: those of the last commit, without any drop begun after it."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, str(size_bytes), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        # The moment of the kill is the thing under test, not a wait for anything.
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(after_s)
    finally:
        writer.kill()
    said = writer.stdout.read()
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    # The last line may be torn by the kill.
    for line in said.splitlines(keepends=True):
        word, *chunks = line.split()
        if word == "dropping":
            # A torn number drops more than was dropped, which only weakens this round.
            committed = committed - set(map(int, chunks)) if line.endswith("\n") else set()
        elif line.endswith("\n"):
            committed = set(map(int, chunks))
    return committed


# ── many threads at once ──


@pytest.mark.slow
def test_threads_together_never_read_a_wrong_byte(path: Path) -> None:
    """Invariant 1 under load: readers, writers, a dropper and commits at once, the hot path among them."""
    count = PAGE_CHUNKS + 40
    size_bytes = count * CHUNK - 5
    cache = CacheDir(path, pages_max=1)
    file = open_new(cache, 1, size_bytes)
    # Few chunks, on both sides of the end of a page, so that threads meet.
    first = PAGE_CHUNKS - 4
    expected = content(1, first * CHUNK, (first + 8) * CHUNK)
    chunks = chunks_content(1, first, 8, size_bytes)
    hits = [0, 0]
    stop = threading.Event()

    def reader(rng: random.Random, read: Callable[[int, int], bytes | None], slot: int) -> None:
        low = rng.randrange(8 * CHUNK - 1)
        high = min(low + rng.randrange(1, 2 * CHUNK), 8 * CHUNK)
        with contextlib.suppress(ChunkAbsent):
            data = read(first * CHUNK + low, first * CHUNK + high)
            if data is not None:
                assert data == expected[low:high]
                hits[slot] += 1

    def writer(rng: random.Random) -> None:
        at = rng.randrange(8)
        file.write(first + at, chunks[at : at + rng.randrange(1, 4)])

    def dropper(rng: random.Random) -> None:
        file.drop([first + rng.randrange(8)])

    def repeat(seed: int, act: Callable[[random.Random], object]) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                act(rng)
        except BaseException as exc:
            failures.append(exc)
            stop.set()

    failures: list[BaseException] = []
    acts: list[Callable[[random.Random], object]] = [
        lambda rng: reader(rng, file.read, 1),
        lambda rng: reader(rng, file.read, 1),
        writer,
        writer,
        dropper,
        lambda _: file.commit(),
        lambda _: file.absent(range(count)),
    ]
    threads = [threading.Thread(target=repeat, args=(seed, act)) for seed, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    # The hot path belongs to one thread: this one.
    rng = random.Random(99)
    for _ in range(100_000):
        if stop.is_set():
            break
        reader(rng, file.read_nowait, 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(hits)
    assert file.verify()[1] == []
    file.commit()
    present = count - len(file.absent(range(count)))
    assert file.present_count == present
    cache.close_image(file.key)
    assert cache.open_image(file.key).present_count == present
    cache.close()
