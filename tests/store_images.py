"""Images for the store's tests: content in which each eight bytes name the image and their own offset."""

from __future__ import annotations

import struct
from pathlib import Path

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_range
from lazyimg.core.identity import ImageRecord
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile
from lazyimg.store.entry import ImageEntry


def image_entry(number: int, size_bytes: int) -> ImageEntry:
    """Return the entry of the image of this number, as it is when it is first seen."""
    image_id = f"00000000-0000-0000-0000-{number:012x}"
    record = ImageRecord(image_id, f"image {number}", "active", size_bytes, "raw")
    return ImageEntry(record, "stored", size_bytes)


def content(number: int, start: int, stop: int) -> bytes:
    """Return the bytes `[start, stop)` of the image of this number; no eight of them are zero."""
    words = range(start // 8, -(-stop // 8))
    whole = struct.pack(f"<{len(words)}Q", *(word << 16 | number + 1 for word in words))
    return whole[start % 8 :][: stop - start]


def chunks_content(number: int, first: int, count: int, size_bytes: int) -> list[bytes]:
    """Return the bytes of each of `count` chunks of an image."""
    return [content(number, *chunk_range(chunk, size_bytes)) for chunk in range(first, first + count)]


def open_new(cache: CacheDir, number: int, size_bytes: int) -> ChunkFile:
    """Make an image known and open its chunk file."""
    entry = image_entry(number, size_bytes)
    cache.index.put(entry)
    return cache.open_image(entry.key)


def store_whole(cache: CacheDir, number: int, size_bytes: int) -> Path:
    """Make an image known, store all of it and close it; return its chunk file."""
    file = open_new(cache, number, size_bytes)
    file.write(0, chunks_content(number, 0, file.chunk_count, size_bytes))
    file.commit()
    cache.close_image(file.key)
    return file.path


def damage(path: Path, chunk: int) -> None:
    """Flip one bit in the middle of a chunk's bytes on disk."""
    with path.open("r+b", buffering=0) as file:
        at = min(chunk * CHUNK_SIZE_BYTES + CHUNK_SIZE_BYTES // 2, path.stat().st_size - 1)
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 4]))
