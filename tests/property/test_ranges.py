"""Chunks and ranges: the arithmetic of presence, for every size."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_count, chunk_range, chunks_of
from lazyimg.image.view import StoredView

# Around the borders of chunks more often than chance would have it.
OFFSETS = st.one_of(
    st.integers(0, 1 << 44),
    st.builds(lambda n, d: max(0, n * CHUNK_SIZE_BYTES + d), st.integers(0, 1 << 20), st.integers(-2, 2)),
)


@settings(deadline=None)
@given(OFFSETS, OFFSETS)
def test_chunks_of_a_range_are_those_it_touches(a: int, b: int) -> None:
    """A range lies within its chunks, and within no fewer."""
    start, stop = sorted((a, b))
    chunks = chunks_of(start, stop)
    if start == stop:
        assert not chunks
        return
    assert chunks[0] * CHUNK_SIZE_BYTES <= start < (chunks[0] + 1) * CHUNK_SIZE_BYTES
    assert chunks[-1] * CHUNK_SIZE_BYTES < stop <= (chunks[-1] + 1) * CHUNK_SIZE_BYTES


@settings(deadline=None)
@given(st.integers(1, 1 << 44), st.data())
def test_chunks_cut_a_file_without_gap_or_overlap(size_bytes: int, data: st.DataObject) -> None:
    """Each byte is in the range of exactly one chunk, none of which is empty."""
    count = chunk_count(size_bytes)
    chunk = data.draw(st.integers(0, count - 1))
    start, stop = chunk_range(chunk, size_bytes)
    assert start < stop
    assert list(chunks_of(start, stop)) == [chunk]
    assert start == (0 if chunk == 0 else chunk_range(chunk - 1, size_bytes)[1])
    assert (stop == size_bytes) == (chunk == count - 1)


@settings(deadline=None)
@given(st.integers(1, 300_000))
def test_stream_brings_the_pieces_of_all_chunks_in_order(size_bytes: int) -> None:
    """What a stream brings is the source from first byte to last, each piece with its chunk."""
    view = StoredView(size_bytes)
    pieces = list(view.stream_pieces())
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert (pieces[0].start, pieces[-1].stop) == (0, size_bytes)
    assert pieces == [piece for chunk in range(chunk_count(size_bytes)) for piece in view.plan(chunk)]
    assert all(piece[:2] == piece[2:4] for piece in pieces)
