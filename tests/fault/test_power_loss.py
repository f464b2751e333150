"""Power is lost at any moment of a cache's life: what it then opens to is right, and what it had promised is there.

Expected of every state the disk can be in (tests/crash_states.py says which these are):

    the cache opens                         no start fails, nothing is set aside
    a chunk that counts as present          has the image's bytes; none is found damaged (data before bit)
    a chunk whose commit had returned       is present, unless it was given up since
    a chunk whose drop had returned         is absent, unless it was written since
    an image, a table that was stored       is known; one that was removed is not
    what was not promised                   can be stored again

And of some of them, with the index gone as well, so that it is rebuilt from the sidecars: the same, but that chunks
may be lost, and may be found damaged.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from crash_states import FATES, CrashDisk, Fate, Record, Tree, digest, write_tree
from faulty_disk import FaultyDisk
from store_images import content, image_entry, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_range
from lazyimg.errors import ChunkDamaged
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("POWER_LOSS_SEED", "1"))
STATES = int(os.environ.get("POWER_LOSS_STATES", "1000"))
STEPS = 40
# Every so many states the cache is also written to and opened again.
USED_EVERY = 25
# And of every so many the index is lost too.
LOST_EVERY = 5
# Small, since every state is written anew; the last chunk of each is short.
SIZES_BYTES = {1: 5 * CHUNK - 9, 2: 3 * CHUNK - 4096, 3: 2 * CHUNK - 1}
# Fewer than images, so that chunk files are also opened and closed by each use.
OPEN_FILES_MAX = 2
TABLE = b"table of the source" * 300


@dataclass
class Promise:
    """What the store has promised of one image: by a call that returned, and not given up by one begun since."""

    is_known: bool | None = None
    present: set[int] = field(default_factory=set)
    absent: set[int] = field(default_factory=set)
    tables: set[int] = field(default_factory=set)


Promises = dict[int, Promise]


class Workload:
    """A cache's life: images come, are written, committed, dropped, spoiled, evicted; it is closed and opened."""

    def __init__(self, disk: FaultyDisk, rng: random.Random) -> None:
        self._disk = disk
        self._rng = rng
        self._promises: Promises = {number: Promise() for number in SIZES_BYTES}
        self._path = disk.path / "cache"
        self._cache = CacheDir(self._path, files_max=OPEN_FILES_MAX)
        self._files: dict[int, ChunkFile] = {}
        # Written since their last commit.
        self._written: dict[int, set[int]] = {number: set() for number in SIZES_BYTES}

    def run(self, steps: int) -> None:
        """Take random steps, and end with the cache closed."""
        actions = [self.write] * 5 + [self.commit] * 4 + [self.drop, self.mark, self.table] * 2
        actions += [self.evict, self.spoil, self.close_image, self.restart]
        for number in SIZES_BYTES:
            self.write(number)
            self.commit(number)
        for _ in range(steps):
            self._rng.choice(actions)(self._rng.choice(list(SIZES_BYTES)))
        self._cache.close()

    def write(self, number: int) -> None:
        file = self._opened(number)
        first = self._rng.randrange(file.chunk_count)
        chunks = range(first, min(first + self._rng.randrange(1, 4), file.chunk_count))
        promise = self._promises[number]
        promise.absent -= set(chunks)
        self._tell()
        file.write(first, [chunk_content(number, chunk) for chunk in chunks])
        self._written[number] |= set(chunks)

    def commit(self, number: int) -> None:
        self._opened(number).commit()
        self._promises[number].present |= self._written[number]
        self._written[number] = set()
        self._tell()

    def drop(self, number: int) -> None:
        file = self._opened(number)
        chunks = set(self._rng.sample(range(file.chunk_count), 2))
        self._promises[number].present -= chunks
        self._tell()
        file.drop(sorted(chunks))
        self._written[number] -= chunks
        self._promises[number].absent |= chunks
        self._tell()

    def mark(self, number: int) -> None:
        """Change the image's entry."""
        self._opened(number)
        entry = image_entry(number, SIZES_BYTES[number])
        self._cache.index.put(entry)

    def table(self, number: int) -> None:
        start = self._rng.randrange(3) * len(TABLE)
        self._opened(number).put_table(start, TABLE)
        self._promises[number].tables.add(start)
        self._tell()

    def evict(self, number: int) -> None:
        self._give_up(number, is_known=None)
        self._cache.remove_image(image_entry(number, SIZES_BYTES[number]).key)
        self._files.pop(number, None)
        self._promises[number].is_known = False
        self._tell()

    def spoil(self, number: int) -> None:
        """Somebody removes the chunk file; the image begins another."""
        file = self._opened(number)
        self.close_image(number)
        self._give_up(number, is_known=True)
        file.path.unlink()
        self._opened(number)

    def close_image(self, number: int) -> None:
        self._cache.close_image(image_entry(number, SIZES_BYTES[number]).key)
        self._files.pop(number, None)
        self._written[number] = set()

    def restart(self, number: int) -> None:
        self._cache.close()
        for number in SIZES_BYTES:
            self.close_image(number)
        self._cache = CacheDir(self._path, files_max=OPEN_FILES_MAX)

    def _opened(self, number: int) -> ChunkFile:
        if number not in self._files:
            key = image_entry(number, SIZES_BYTES[number]).key
            if self._cache.index.get(key):
                self._files[number] = self._cache.open_image(key)
            else:
                # What was removed may come back from here on.
                self._promises[number].is_known = None
                self._tell()
                self._files[number] = open_new(self._cache, number, SIZES_BYTES[number])
                self._promises[number].is_known = True
                self._tell()
        return self._files[number]

    def _give_up(self, number: int, is_known: bool | None) -> None:
        self._promises[number] = Promise(is_known)
        self._written[number] = set()
        self._tell()

    def _tell(self) -> None:
        """Write what is promised from here on into the record."""
        told = {
            number: [one.is_known, *map(sorted, (one.present, one.absent, one.tables))]
            for number, one in self._promises.items()
        }
        self._disk.mark(json.dumps(told))


@cache
def chunk_content(number: int, chunk: int) -> bytes:
    return content(number, *chunk_range(chunk, SIZES_BYTES[number]))


def promised(mark: str) -> Promises:
    return {
        int(number): Promise(is_known, *map(set, sets))
        for number, (is_known, *sets) in json.loads(mark).items()
    }


@dataclass(frozen=True)
class Crash:
    """A state the disk may be in after power was lost, and what had been promised by then."""

    name: str
    state: Tree
    promises: Promises


def crashes(records: list[Record]) -> Iterator[Crash]:
    """Yield STATES different crashes, spread at random over every moment that left anything pending."""
    disk, points = CrashDisk(), list[tuple[int, Fate, int]]()
    for at, record in enumerate(records, 1):
        disk.play(record)
        if record[0] != "mark" and disk.pending_count:
            points += [(at, fate, 0) for fate in FATES]
    # Chance has more to give than one state a moment, where more states are wanted.
    for again in range(1, 1 + 3 * STATES // len(points)):
        points += [(at, fate, again) for at, fate, first in points if not first and fate in ("mixed", "torn")]
    random.Random(SEED).shuffle(points)
    seen: set[bytes] = set()
    # Several goes through the record, each in its order; the first brings nearly all.
    while points and len(seen) < STATES:
        wanted = STATES - len(seen)
        chosen, points = sorted(points[:wanted]), points[wanted:]
        disk, promises, played = CrashDisk(), Promises(), 0
        for at, fate, again in chosen:
            for record in records[played:at]:
                disk.play(record)
                if record[0] == "mark":
                    promises = promised(record[1])
            played = at
            state = disk.crash(fate, random.Random(f"{SEED} {at} {fate} {again}"))
            if digest(state) not in seen:
                seen.add(digest(state))
                yield Crash(f"POWER_LOSS_SEED={SEED}, after operation {at}: {fate} {again}", state, promises)


def check(path: Path, promises: Promises, *, is_index_lost: bool = False) -> None:
    """Open what power loss left and hold it against what was promised."""
    with closing(CacheDir(path)) as opened:
        known = {entry.key for entry in opened.index.entries()}
        for number, size_bytes in SIZES_BYTES.items():
            promise, key = promises.get(number, Promise()), image_entry(number, size_bytes).key
            assert promise.is_known is None or promise.is_known == (key in known), "image known"
            if key not in known:
                continue
            file = opened.open_image(key)
            absent = set(file.absent(range(file.chunk_count)))
            assert is_index_lost or not promise.present & absent, "committed chunks are lost"
            assert promise.absent <= absent, "dropped chunks came back"
            for chunk in set(range(file.chunk_count)) - absent:
                try:
                    assert file.read(*chunk_range(chunk, size_bytes)) == chunk_content(number, chunk)
                except ChunkDamaged:
                    assert is_index_lost, "a chunk counts as present that is not on disk"
            for start in promise.tables:
                assert file.table(start, start + len(TABLE)) == TABLE, "a table is lost"


def check_use(path: Path) -> None:
    """The cache can be filled, and opened again."""
    for _ in range(2):
        with closing(CacheDir(path)) as opened:
            for number, size_bytes in SIZES_BYTES.items():
                file = open_new(opened, number, size_bytes)
                file.write(0, [chunk_content(number, chunk) for chunk in range(file.chunk_count)])
                file.commit()
                assert file.read(0, size_bytes) == content(number, 0, size_bytes)


@pytest.fixture
def records(memory_path: Path, mountable: None, expected_warnings: Callable[..., None]) -> list[Record]:
    """What a workload wrote to its disk."""
    expected_warnings("set aside: it is missing", required=False)
    disk = FaultyDisk(memory_path, memory_path / "record")
    try:
        Workload(disk, random.Random(SEED)).run(STEPS)
        return list(disk.records())
    finally:
        disk.end()


def test_power_loss_leaves_right_bytes_and_what_was_promised(
    records: list[Record], memory_path: Path, expected_warnings: Callable[..., None]
) -> None:
    """[I2] Data before bit, and the index forgets first: in every state that power loss can leave."""
    # An entry that was never promised may be torn.
    torn = r"sidecar .*\.entry is damaged"
    expected_warnings("rebuilt from sidecars", "damaged chunks dropped", torn, required=False)
    count = 0
    for count, crash in enumerate(crashes(records), 1):
        try:
            with written(crash.state, memory_path / "state") as folder:
                check(folder / "cache", crash.promises)
                if count % USED_EVERY == 0:
                    check_use(folder / "cache")
            cache_folder = crash.state.get("cache")
            if count % LOST_EVERY == 0 and isinstance(cache_folder, dict) and cache_folder.pop("index", None):
                with written(crash.state, memory_path / "state") as folder:
                    check(folder / "cache", crash.promises, is_index_lost=True)
        except Exception as exc:
            exc.add_note(crash.name)
            raise
    print(f"{count} crash states of {len(records)} operations, POWER_LOSS_SEED={SEED}")
    assert count >= STATES


@contextmanager
def written(state: Tree, folder: Path) -> Iterator[Path]:
    """Make a state real for the length of the block."""
    write_tree(state, folder)
    yield folder
    shutil.rmtree(folder)
