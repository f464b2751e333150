"""How an image's source is presented: which source pieces complete which chunks, and how they are decoded.

A chunk is a part of what is presented, a piece a part of the source; only here are the two brought together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_count, chunk_range
from lazyimg.core.fetchplan import Piece


class View(Protocol):
    """What the fetcher needs to know of a view."""

    @property
    def size_bytes(self) -> int:
        """Bytes presented."""

    @property
    def source_size_bytes(self) -> int:
        """Bytes of the source."""

    def pieces(self, chunks: Iterable[int]) -> list[Piece]:
        """Return the source pieces that these chunks need, in the order of the chunks."""

    def chunks(self, piece: Piece) -> range:
        """Return the chunks that a piece completes."""

    def decode(self, piece: Piece, data: bytes) -> list[tuple[int, bytes]]:
        """Return each completed chunk with its presented bytes."""

    def stream_pieces(self) -> Iterator[Piece]:
        """Yield the pieces of the whole source in the order in which a stream brings them."""


class StoredView:
    """The bytes as Glance stores them: chunk n is piece n."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def source_size_bytes(self) -> int:
        return self._size_bytes

    def pieces(self, chunks: Iterable[int]) -> list[Piece]:
        return [Piece(*chunk_range(chunk, self._size_bytes)) for chunk in chunks]

    def chunks(self, piece: Piece) -> range:
        first = piece.start // CHUNK_SIZE_BYTES
        return range(first, first + 1)

    def decode(self, piece: Piece, data: bytes) -> list[tuple[int, bytes]]:
        return [(piece.start // CHUNK_SIZE_BYTES, data)]

    def stream_pieces(self) -> Iterator[Piece]:
        return iter(self.pieces(range(chunk_count(self._size_bytes))))
