"""The index: entries, pages of checksums, and which images to evict."""

from __future__ import annotations

import errno
import json
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import diskcache
import pytest
from store_images import image_entry

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.store.entry import ImageEntry
from lazyimg.store.eviction import to_evict
from lazyimg.store.index import PAGE_CHUNKS, Index

ENTRY = image_entry(1, 100 * CHUNK)
GENERATION = "0123456789abcdef"
SUMS = tuple(range(1, PAGE_CHUNKS + 1))
GIB = 1 << 30


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = Index(tmp_path)
    yield index
    index.close()


def reopen(index: Index, tmp_path: Path) -> Index:
    index.close()
    return Index(tmp_path)


def test_entry_survives_its_json() -> None:
    """An entry is read back as it was written, every field."""
    entry = replace(
        ENTRY,
        generation=GENERATION,
        present_count=7,
        last_used_s=1.5,
        mtime_ns=2,
        in_use=True,
        source="stream",
    )
    assert ImageEntry.from_json(entry.to_json()) == entry


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"size_bytes": "5"},
        {"size_bytes": -1},
        {"in_use": 1},
        {"generation": "../../etc/passwd"},
        {"present_count": 101},
        {"last_used_s": float("nan")},
        {"unknown": 1},
        {"record": "{}"},
    ],
    ids=str,
)
def test_malformed_entry_is_refused(change: dict[str, object]) -> None:
    """An entry with any field out of its type or range is not an entry."""
    text = json.dumps(json.loads(ENTRY.to_json()) | change)
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        ImageEntry.from_json(text)


def test_entries_survive_a_restart(index: Index, tmp_path: Path) -> None:
    """What was put is there in the next process."""
    other = image_entry(2, 5)
    index.put(ENTRY, other)
    index = reopen(index, tmp_path)
    assert index.entries() == sorted([ENTRY, other], key=lambda entry: entry.key)
    assert index.get(ENTRY.key) == ENTRY
    assert index.get("0" * 32) is None
    index.close()


def test_put_leaves_the_chunk_files_fields(index: Index) -> None:
    """The catalog cannot overwrite generation and count by putting an older copy of the entry."""
    index.put(ENTRY)
    index.begin(ENTRY.key, GENERATION)
    index.commit(ENTRY.key, GENERATION, {0: SUMS}, 3)
    index.put(replace(ENTRY, in_use=True))
    assert index.get(ENTRY.key) == replace(ENTRY, in_use=True, generation=GENERATION, present_count=3)


def test_commit_stores_pages_and_count_as_one(index: Index, tmp_path: Path) -> None:
    """Pages and present_count are both there after a restart; other pages are all absent."""
    index.put(ENTRY)
    index.begin(ENTRY.key, GENERATION)
    index.commit(ENTRY.key, GENERATION, {0: SUMS, 2: [0] * 1023 + [2**64 - 1]}, 5)
    index = reopen(index, tmp_path)
    entry = index.get(ENTRY.key)
    assert entry is not None
    assert entry.present_count == 5
    assert index.page(ENTRY.key, GENERATION, 0) == SUMS
    assert index.page(ENTRY.key, GENERATION, 1) == (0,) * PAGE_CHUNKS
    assert index.page(ENTRY.key, GENERATION, 2)[-1] == 2**64 - 1
    index.close()


def test_new_generation_knows_nothing_of_the_last(index: Index) -> None:
    """Beginning a generation forgets the pages of the last, under either name."""
    index.put(ENTRY)
    index.begin(ENTRY.key, GENERATION)
    index.commit(ENTRY.key, GENERATION, {0: SUMS}, 5)
    entry = index.begin(ENTRY.key, "f" * 16)
    assert (entry.generation, entry.present_count) == ("f" * 16, 0)
    for generation in (GENERATION, "f" * 16):
        assert not any(index.page(ENTRY.key, generation, 0))


def test_forgotten_image_cannot_be_committed(index: Index, tmp_path: Path) -> None:
    """A commit that comes after the image was forgotten, or began anew, fails and leaves no trace."""
    index.put(ENTRY)
    index.begin(ENTRY.key, GENERATION)
    index.begin(ENTRY.key, "f" * 16)
    with pytest.raises(OSError, match="no generation") as caught:
        index.commit(ENTRY.key, GENERATION, {0: SUMS}, 5)
    assert caught.value.errno == errno.ESTALE
    index.commit(ENTRY.key, "f" * 16, {0: SUMS}, 5)
    index.forget(ENTRY.key)
    index.forget(ENTRY.key)
    with pytest.raises(OSError, match="no generation"):
        index.commit(ENTRY.key, "f" * 16, {0: SUMS}, 5)
    index = reopen(index, tmp_path)
    assert index.entries() == []
    assert not any(index.page(ENTRY.key, "f" * 16, 0))
    index.close()


def test_malformed_entry_costs_only_its_image(
    index: Index, tmp_path: Path, expected_warnings: Callable[..., None]
) -> None:
    """One bad record is dropped with its pages and logged; the others are not touched."""
    expected_warnings(f"entry {ENTRY.key} dropped", "page 0 of .* is malformed")
    other = image_entry(2, 5)
    index.put(ENTRY, other)
    index.begin(ENTRY.key, GENERATION)
    index.commit(ENTRY.key, GENERATION, {0: SUMS}, 5)
    index.close()
    with diskcache.Cache(str(tmp_path)) as raw:
        raw[f"image/{ENTRY.key}"] = b"\x00 not an entry"
        raw[f"page/{other.key}/{GENERATION}/0"] = b"short"
    index = Index(tmp_path)
    assert index.entries() == [other]
    assert not any(index.page(ENTRY.key, GENERATION, 0))
    assert not any(index.page(other.key, GENERATION, 0))
    index = reopen(index, tmp_path)
    assert index.entries() == [other]
    index.close()


class Unpickled(Exception):
    """Raised where a pickle of the index is loaded."""


def _explode() -> None:
    raise Unpickled


class Bomb:
    """An object whose pickle calls `_explode` when loaded."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return _explode, ()


def test_pickles_in_the_index_are_never_loaded(
    index: Index, tmp_path: Path, expected_warnings: Callable[..., None]
) -> None:
    """A value that diskcache would unpickle is dropped unread: it could run any code."""
    expected_warnings(f"entry {ENTRY.key} dropped")
    index.put(ENTRY)
    index.close()
    with diskcache.Cache(str(tmp_path)) as raw:
        raw[f"image/{ENTRY.key}"] = Bomb()
    index = Index(tmp_path)
    assert index.entries() == []
    index.close()


@pytest.mark.slow
def test_disk_that_cannot_be_written_says_so(index: Index) -> None:
    """What SQLite finds read-only is EROFS, which is no fault: the disk is read on."""
    index.put(ENTRY)
    # Of this thread's connection: it refuses changes with the code that a read-only disk has.
    index._cache._sql("PRAGMA query_only = 1")
    with pytest.raises(OSError, match="cache index") as caught:
        index.put(replace(ENTRY, mtime_ns=5))
    assert caught.value.errno == errno.EROFS
    assert index.get(ENTRY.key) == ENTRY


def test_hundred_whole_images_cost_little_memory(tmp_path: Path) -> None:
    """An index of 100 images, 20 GiB each, is opened without reading its pages: under 2 MiB at the peak."""
    index = Index(tmp_path)
    entries = [image_entry(number, 20 * GIB) for number in range(100)]
    pages = dict.fromkeys(range(320), SUMS)
    index.put(*entries)
    # A tenth of them wholly present: 25 MiB of pages, enough to show if any were read.
    for entry in entries[::10]:
        index.begin(entry.key, GENERATION)
        index.commit(entry.key, GENERATION, pages, 320 * PAGE_CHUNKS)
    index.close()
    tracemalloc.start()
    try:
        index = Index(tmp_path)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index.entries()) == 100
    assert peak_bytes < 2 << 20
    index.close()


def _used(number: int, last_used_s: float) -> ImageEntry:
    return replace(image_entry(number, 10 * GIB), last_used_s=last_used_s)


OLD, MIDDLE, YOUNG = _used(1, 10), _used(2, 20), _used(3, 30)
IMAGES = [(YOUNG, 3 * GIB), (OLD, 1 * GIB), (MIDDLE, 2 * GIB)]


@pytest.mark.parametrize(
    ("size_max", "free", "free_min", "open_", "pinned", "expected"),
    [
        (0, 5, 1, (), (), ()),
        (6, 5, 1, (), (), ()),
        (5, 5, 1, (), (), (OLD,)),
        (3, 5, 1, (), (), (OLD, MIDDLE)),
        (0, 0, 3, (), (), (OLD, MIDDLE)),
        (5, 0, 3, (), (), (OLD, MIDDLE)),
        (5, 5, 1, (OLD,), (), (MIDDLE,)),
        (5, 5, 1, (), (OLD,), (MIDDLE,)),
        (1, 5, 1, (OLD, YOUNG), (MIDDLE,), ()),
        (1, 0, 99, (), (), (OLD, MIDDLE, YOUNG)),
    ],
)
def test_least_recently_used_go_first_and_never_open_or_pinned_ones(
    size_max: int,
    free: int,
    free_min: int,
    open_: tuple[ImageEntry, ...],
    pinned: tuple[ImageEntry, ...],
    expected: tuple[ImageEntry, ...],
) -> None:
    """Invariant 7: an image that is open, or that Glance no longer has, is never evicted."""
    keys = to_evict(
        IMAGES, {e.key for e in open_}, {e.key for e in pinned}, size_max * GIB, free * GIB, free_min * GIB
    )
    assert keys == [entry.key for entry in expected]


def test_image_without_bytes_is_not_evicted_in_vain() -> None:
    """Dropping an image that takes no room on disk frees nothing."""
    assert to_evict([(OLD, 0), (YOUNG, GIB)], (), (), 1, GIB, 0) == [YOUNG.key]
