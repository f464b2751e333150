"""Chunks: numbers worked out by hand; the rules are in tests/property/test_ranges.py."""

from __future__ import annotations

import pytest

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_count, chunk_range, chunks_of


@pytest.mark.parametrize(
    ("size_bytes", "count"), [(0, 0), (1, 1), (CHUNK, 1), (CHUNK + 1, 2), (20 << 30, 327_680)]
)
def test_last_chunk_may_be_short(size_bytes: int, count: int) -> None:
    """A file has as many chunks as it takes to hold its last byte."""
    assert chunk_count(size_bytes) == count


@pytest.mark.parametrize(
    ("start", "stop", "chunks"),
    [
        (0, 0, []),
        (5, 5, []),
        (7, 3, []),
        (0, 1, [0]),
        (CHUNK - 1, CHUNK + 1, [0, 1]),
        (CHUNK, 2 * CHUNK, [1]),
    ],
)
def test_range_touches_chunks(start: int, stop: int, chunks: list[int]) -> None:
    """Ranges are half-open, and an empty one touches nothing."""
    assert list(chunks_of(start, stop)) == chunks


def test_chunk_range_ends_with_the_file() -> None:
    """The last chunk's range does not reach past the last byte."""
    assert chunk_range(0, CHUNK + 10) == (0, CHUNK)
    assert chunk_range(1, CHUNK + 10) == (CHUNK, CHUNK + 10)
