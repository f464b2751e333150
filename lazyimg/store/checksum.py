"""Checksums of chunks: xxh3_64, quick enough (10 GB/s here) to check every chunk that is not yet proven.

They guard against disks, crashes and mistakes, not against somebody who can write the private cache folder.
"""

from __future__ import annotations

from xxhash import xxh3_64_intdigest

from lazyimg.core.chunks import CHUNK_SIZE_BYTES


def checksum(chunk: bytes | bytearray | memoryview) -> int:
    """Return the checksum of one chunk, never 0: that means absent in the index, a true 0 becomes 1."""
    return xxh3_64_intdigest(chunk) or 1


def checksums(data: bytes | memoryview) -> list[int]:
    """Return the checksum of each chunk of `data`, which begins at a chunk; the last one may be short."""
    view = memoryview(data)
    return [checksum(view[at : at + CHUNK_SIZE_BYTES]) for at in range(0, len(data), CHUNK_SIZE_BYTES)]
