"""Zeros take no disk, and tables are kept beside the chunks."""

from __future__ import annotations

from pathlib import Path

from lazyimg.core.chunks import CHUNK_SIZE_BYTES
from lazyimg.core.identity import ImageRecord
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry

RECORD = ImageRecord("0" * 8, "sparse", "active", 64 * CHUNK_SIZE_BYTES, "raw", checksum="5")
ENTRY = ImageEntry(RECORD, "raw", 64 * CHUNK_SIZE_BYTES)
ZEROS = bytes(CHUNK_SIZE_BYTES)


def test_chunks_of_zeros_become_holes(tmp_path: Path) -> None:
    """A chunk of zeros is present, durable and read as zeros, and takes no disk."""
    cache = CacheDir(tmp_path / "cache")
    cache.index.put(ENTRY)
    file = cache.open_image(ENTRY.key)
    file.write(0, [ZEROS] * 31 + [b"x" * CHUNK_SIZE_BYTES] + [ZEROS] * 32)
    file.commit()
    assert file.is_whole
    assert file.allocated_bytes == CHUNK_SIZE_BYTES
    assert file.read(30 * CHUNK_SIZE_BYTES, 33 * CHUNK_SIZE_BYTES) == ZEROS + b"x" * CHUNK_SIZE_BYTES + ZEROS
    cache.close()
    cache = CacheDir(tmp_path / "cache")
    assert cache.open_image(ENTRY.key).read(0, 16 * CHUNK_SIZE_BYTES) == ZEROS * 16
    cache.close()


def test_a_hole_replaces_what_a_dropped_chunk_left(tmp_path: Path) -> None:
    """[I1] Zeros written where other bytes were dropped are zeros, not those bytes."""
    cache = CacheDir(tmp_path / "cache")
    cache.index.put(ENTRY)
    file = cache.open_image(ENTRY.key)
    file.write(3, [b"old" * 21845 + b"!"])
    file.commit()
    file.drop([3])
    file.write(3, [ZEROS])
    assert file.read(3 * CHUNK_SIZE_BYTES, 4 * CHUNK_SIZE_BYTES) == ZEROS
    cache.close()


def test_tables_last_as_long_as_their_image(tmp_path: Path) -> None:
    """A table is there after a restart, only in its own length and unspoiled, and goes with its image."""
    cache = CacheDir(tmp_path / "cache")
    cache.index.put(ENTRY)
    cache.open_image(ENTRY.key).put_table(65536, b"t" * 512)
    cache.close()
    cache = CacheDir(tmp_path / "cache")
    file = cache.open_image(ENTRY.key)
    assert file.table(65536, 65536 + 512) == b"t" * 512
    assert file.table(65536, 65536 + 1024) is None
    assert file.table(0, 512) is None
    cache.index._cache.set(f"table/{ENTRY.key}/65536", b"\0" * 8 + b"u" * 512, tag=ENTRY.key)
    assert file.table(65536, 65536 + 512) is None
    cache.remove_image(ENTRY.key)
    cache.index.put_table(ENTRY.key, 0, b"late")
    assert cache.index.table(ENTRY.key, 0, 4) is None
    cache.close()
