"""Chunks and ranges: the arithmetic of presence.  Ranges are half-open `[start, stop)` in bytes."""

from __future__ import annotations

# 64 KiB: a Debian boot touches 36 MB of such chunks, 27 MB of 4 KiB ones and 116 MB of 1 MiB ones; it is also
# the default cluster of a qcow2 overlay, so that one guest cluster is one chunk.
CHUNK_SIZE_BYTES = 1 << 16


def chunk_count(size_bytes: int) -> int:
    """Return how many chunks a file of this size has; the last one may be short."""
    return -(-size_bytes // CHUNK_SIZE_BYTES)


def chunks_of(start: int, stop: int) -> range:
    """Return the chunks that `[start, stop)` touches; none for an empty range."""
    if stop <= start:
        return range(0)
    return range(start // CHUNK_SIZE_BYTES, -(-stop // CHUNK_SIZE_BYTES))


def chunk_range(chunk: int, size_bytes: int) -> tuple[int, int]:
    """Return the bytes `[start, stop)` of a chunk in a file of `size_bytes`."""
    start = chunk * CHUNK_SIZE_BYTES
    return start, min(start + CHUNK_SIZE_BYTES, size_bytes)
