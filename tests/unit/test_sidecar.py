"""Sidecars: what an index that was lost is rebuilt from, and what must not come back through them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from store_images import chunks_content, content, damage, image_entry, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ChunkDamaged
from lazyimg.store import sidecar
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.index import PAGE_CHUNKS

COUNT = 5
SIZE_BYTES = COUNT * CHUNK - 7
ENTRY = image_entry(1, SIZE_BYTES)
KEY = ENTRY.key
TABLES = {0: b"head" * 1000, 1 << 20: b"a table" * 100}


@pytest.fixture
def path(memory_path: Path) -> Path:
    return memory_path / "cache"


@contextmanager
def opened(path: Path) -> Iterator[CacheDir]:
    cache = CacheDir(path)
    try:
        yield cache
    finally:
        cache.close()


def fill(path: Path, *, present: int = COUNT) -> None:
    """Make a cache with one image in use, some of its chunks, and its tables."""
    with opened(path) as cache:
        file = open_new(cache, 1, SIZE_BYTES)
        cache.index.put(replace(ENTRY, in_use=True, mtime_ns=5, last_used_s=2.5))
        file.write(0, chunks_content(1, 0, present, SIZE_BYTES))
        file.commit()
        for start, data in TABLES.items():
            file.put_table(start, data)


def lose_index(path: Path) -> None:
    shutil.rmtree(path / "index")


def only_sidecar(path: Path, suffix: str) -> Path:
    (found,) = path.glob(f"sidecars/*.{suffix}")
    return found


@pytest.fixture
def rebuilt(expected_warnings: Callable[..., None]) -> None:
    """The rebuilding is announced."""
    expected_warnings("cache index rebuilt from sidecars")


def test_lost_index_is_rebuilt(path: Path, rebuilt: None) -> None:
    """Entry, chunks and tables are all there again, the chunks to be proven by their checksums."""
    fill(path)
    with opened(path) as cache:
        before = cache.index.entries()
    lose_index(path)
    for _ in range(2):
        with opened(path) as cache:
            assert cache.index.entries() == before
            assert (before[0].in_use, before[0].present_count) == (True, COUNT)
            file = cache.open_image(KEY)
            assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
            assert {start: file.table(start, start + len(data)) for start, data in TABLES.items()} == TABLES


def test_rebuilding_that_was_cut_short_begins_anew(path: Path, rebuilt: None) -> None:
    """A crash in the middle of rebuilding loses nothing: what is not listed yet is rebuilt again."""
    fill(path)
    with opened(path) as cache:
        open_new(cache, 2, SIZE_BYTES)
    lose_index(path)
    with (
        mock.patch("lazyimg.store.sidecar.Sidecars.tables", side_effect=[iter(()), RuntimeError("killed")]),
        pytest.raises(RuntimeError, match="killed"),
    ):
        CacheDir(path)
    with opened(path) as cache:
        assert len(cache.index.entries()) == 2
        assert cache.open_image(KEY).table(0, 4000) == TABLES[0]


def test_dropped_chunk_does_not_come_back(path: Path, rebuilt: None) -> None:
    """[I2] Bytes that were dropped, for whatever reason, are absent in a rebuilt index too."""
    fill(path)
    with opened(path) as cache:
        cache.open_image(KEY).drop([1, 3])
    lose_index(path)
    with opened(path) as cache:
        assert cache.open_image(KEY).absent(range(COUNT)) == [1, 3]


def test_drop_that_cannot_be_recorded_takes_the_sidecar_away(path: Path, rebuilt: None) -> None:
    """Where the sidecar cannot be written it is removed: an index rebuilt later has none of the image's chunks."""
    fill(path)
    with opened(path) as cache:
        file = cache.open_image(KEY)
        with mock.patch("os.fdatasync", side_effect=OSError(errno.EIO, "injected")):
            file.drop([1])
        assert file.absent(range(COUNT)) == [1]
    lose_index(path)
    with opened(path) as cache:
        assert cache.open_image(KEY).absent(range(COUNT)) == list(range(COUNT))


def test_removed_image_does_not_come_back(path: Path) -> None:
    """Nothing is left of an image that was removed, nor of one of whose file another generation began."""
    fill(path)
    with opened(path) as cache:
        cache.remove_image(KEY)
    assert list(path.glob("sidecars/*")) == []
    lose_index(path)
    with opened(path) as cache:
        assert cache.index.entries() == []


def test_sidecars_without_an_image_are_removed(path: Path) -> None:
    """While the index is there it knows best: what it does not know goes, what is missing is written again."""
    fill(path)
    entry = only_sidecar(path, "entry")
    text = entry.read_bytes()
    entry.unlink()
    (path / "sidecars" / f"{'0' * 32}.entry").write_bytes(text)
    (path / "sidecars" / f"{KEY}.{'0' * 16}.sums").write_bytes(bytes(8192))
    (path / "sidecars" / "folder").mkdir()
    with opened(path):
        assert only_sidecar(path, "entry").read_bytes() == text
        assert len(list(path.glob("sidecars/*"))) == 3


def test_sums_that_power_loss_took_are_written_again(path: Path, rebuilt: None) -> None:
    """A sidecar that is behind the index is made whole when the image is next opened."""
    fill(path)
    os.truncate(only_sidecar(path, "sums"), 8)
    with opened(path) as cache:
        cache.open_image(KEY)
    lose_index(path)
    with opened(path) as cache:
        assert cache.open_image(KEY).is_whole


def test_sums_that_are_wrong_prove_nothing(
    path: Path, rebuilt: None, expected_warnings: Callable[..., None]
) -> None:
    """[I1] A checksum of the sidecar that does not fit the bytes costs a fetch, and rubbish past the end nothing."""
    expected_warnings("1 damaged chunks dropped")
    fill(path)
    lose_index(path)
    sums = only_sidecar(path, "sums")
    with sums.open("r+b") as hand:
        hand.seek(2 * 8)
        hand.write(b"rubbish!")
        hand.seek(COUNT * 8)
        hand.write(b"rubbish!" * PAGE_CHUNKS)
    with opened(path) as cache:
        file = cache.open_image(KEY)
        assert file.present_count == COUNT
        with pytest.raises(ChunkDamaged) as caught:
            file.read(0, SIZE_BYTES)
        assert caught.value.chunks == [2]
        file.write(2, chunks_content(1, 2, 1, SIZE_BYTES))
        assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


def test_swapped_chunk_files_prove_nothing(
    path: Path, rebuilt: None, expected_warnings: Callable[..., None]
) -> None:
    """[I1] Two images' chunk files under each other's names, and no index: none of their bytes is returned."""
    expected_warnings("5 damaged chunks dropped")
    fill(path)
    with opened(path) as cache:
        other = open_new(cache, 2, SIZE_BYTES)
        other.write(0, chunks_content(2, 0, COUNT, SIZE_BYTES))
        other.commit()
    one, two = sorted(path.glob("chunks/*"))
    one.rename(path / "between")
    two.rename(one)
    (path / "between").rename(two)
    lose_index(path)
    with opened(path) as cache:
        for number in (1, 2):
            file = cache.open_image(image_entry(number, SIZE_BYTES).key)
            with pytest.raises(ChunkDamaged):
                file.read(0, SIZE_BYTES)
            assert file.present_count == 0


@pytest.mark.parametrize(
    "spoil", ["torn", "empty", "other version", "other key", "other text", "link", "folder"]
)
def test_spoiled_entry_costs_only_its_image(
    spoil: str, path: Path, rebuilt: None, expected_warnings: Callable[..., None]
) -> None:
    """A sidecar that is not what was written is told and passed over; the other images are rebuilt."""
    expected_warnings("is damaged or of another version; its image is forgotten")
    fill(path)
    other = image_entry(2, SIZE_BYTES)
    with opened(path) as cache:
        cache.index.put(other)
    lose_index(path)
    entry = path / "sidecars" / f"{KEY}.entry"
    text = entry.read_bytes()
    values = json.loads(text)
    entry.unlink()
    match spoil:
        case "torn":
            entry.write_bytes(text[: len(text) // 2])
        case "empty":
            entry.write_bytes(b"")
        case "other version":
            entry.write_text(json.dumps(values | {"version": 2}))
        case "other key":
            shutil.copy(path / "sidecars" / f"{other.key}.entry", entry)
        case "other text":
            entry.write_text(json.dumps(values | {"entry": values["entry"].replace("raw", "iso")}))
        case "link":
            (path.parent / "elsewhere").write_bytes(text)
            entry.symlink_to(path.parent / "elsewhere")
        case "folder":
            entry.mkdir()
    with opened(path) as cache:
        assert [one.key for one in cache.index.entries()] == [other.key]
        assert not list(path.glob("chunks/*"))
    with opened(path) as cache:
        assert [one.key for one in cache.index.entries()] == [other.key]


def test_torn_table_costs_only_itself(path: Path, rebuilt: None) -> None:
    """Tables up to a torn one are believed, and the next that is put takes its place."""
    fill(path)
    tables = only_sidecar(path, "tables")
    os.truncate(tables, tables.stat().st_size - 1)
    with opened(path) as cache:
        cache.open_image(KEY).put_table(5 << 20, b"another")
    lose_index(path)
    with opened(path) as cache:
        file = cache.open_image(KEY)
        assert file.table(0, 4000) == TABLES[0]
        assert file.table(1 << 20, (1 << 20) + 700) is None
        assert file.table(5 << 20, (5 << 20) + 7) == b"another"


def test_table_put_again_takes_the_others_place(path: Path, rebuilt: None) -> None:
    """Of two tables with one start the later one counts."""
    fill(path)
    with opened(path) as cache:
        cache.open_image(KEY).put_table(0, b"anew" * 1000)
    lose_index(path)
    with opened(path) as cache:
        assert cache.open_image(KEY).table(0, 4000) == b"anew" * 1000


def test_tables_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5] Tables above the limit are kept in the index alone."""
    monkeypatch.setattr(sidecar, "TABLES_BYTES_MAX", 1000)
    fill(path)
    assert only_sidecar(path, "tables").stat().st_size < 1000
    with opened(path) as cache:
        assert cache.open_image(KEY).table(0, 4000) == TABLES[0]


def test_table_that_claims_to_be_huge_is_not_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, rebuilt: None
) -> None:
    """[I5] A frame longer than all tables may be ends the file, whatever its length promises."""
    fill(path)
    lose_index(path)
    monkeypatch.setattr(sidecar, "TABLES_BYTES_MAX", 1000)
    with opened(path) as cache:
        file = cache.open_image(KEY)
        assert file.is_whole
        assert file.table(0, 4000) is None


def test_failing_index_does_not_keep_an_image_from_being_opened(path: Path) -> None:
    """What is compared only for a later loss of the index is not compared while the index fails."""
    fill(path)
    os.truncate(only_sidecar(path, "sums"), 8)
    with opened(path) as cache:
        with mock.patch.object(cache.index, "heal_sidecar", side_effect=OSError(errno.EIO, "injected")):
            file = cache.open_image(KEY)
        assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


def test_failing_sidecars_cost_no_commit(path: Path) -> None:
    """A disk that takes no sidecars leaves index and chunks as they are; images just have no second record."""
    with mock.patch(
        "lazyimg.store.folder.PrivateFolder.replace", side_effect=OSError(errno.ENOSPC, "injected")
    ):
        path.mkdir()
        (path / "version").write_text("1\n")
        with opened(path) as cache:
            file = open_new(cache, 1, SIZE_BYTES)
            (path / "sidecars" / f"{KEY}.{cache.index.entries()[0].generation}.sums").mkdir()
            (path / "sidecars" / f"{KEY}.{cache.index.entries()[0].generation}.tables").mkdir()
            file.write(0, chunks_content(1, 0, COUNT, SIZE_BYTES))
            assert file.commit() == COUNT
            file.put_table(0, TABLES[0])
    with opened(path) as cache:
        file = cache.open_image(KEY)
        assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
        assert file.table(0, 4000) == TABLES[0]


def test_malformed_entry_of_the_index_is_taken_from_its_sidecar(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """One bad record of the index costs its image nothing."""
    expected_warnings(f"entry {KEY} is taken from its sidecar")
    fill(path)
    with opened(path) as cache:
        cache.index._cache.set(f"image/{KEY}", b"not an entry")
    with opened(path) as cache:
        assert cache.open_image(KEY).is_whole


def test_damage_is_damage_after_rebuilding(
    path: Path, rebuilt: None, expected_warnings: Callable[..., None]
) -> None:
    """[I1] A chunk that changed on disk while the index was lost is found at its first read."""
    expected_warnings("1 damaged chunks dropped")
    fill(path)
    lose_index(path)
    (file_path,) = path.glob("chunks/*")
    damage(file_path, 4)
    with opened(path) as cache:
        assert cache.open_image(KEY).verify() == (COUNT, [4])
