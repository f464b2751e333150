"""How an image's source is presented: which source pieces complete which chunks, and how they are decoded.

A chunk is a part of what is presented, a piece a part of the source; only here and in rawview.py are the two
brought together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_count, chunk_range
from lazyimg.core.fetchplan import Piece


class View(Protocol):
    """What the fetcher needs to know of a view.  Synchronous; used from the event loop only."""

    @property
    def size_bytes(self) -> int:
        """Bytes presented."""

    @property
    def source_size_bytes(self) -> int:
        """Bytes of the source."""

    @property
    def is_streamable(self) -> bool:
        """False where only ranges can be decoded: `stream_pieces` must not be called."""

    def missing_tables(self, chunks: Sequence[int]) -> list[Piece]:
        """Return the tables to give before these chunks, in ascending order, can be planned; none: plan now.

        Raises SourceDamaged where a table that was given is not what the format allows.
        """

    def give_table(self, piece: Piece, data: bytes) -> None:
        """Take a table that was missing."""

    def tables_of(self, chunks: Sequence[int]) -> list[Piece]:
        """Return the tables, of those that were given, which say where these chunks are."""

    def forget_table(self, piece: Piece) -> None:
        """Have a table given again."""

    def plan(self, chunk: int) -> list[Piece]:
        """Return the pieces that this chunk still needs; none for a chunk of zeros.  Raises SourceDamaged."""

    def decode(self, piece: Piece, data: bytes) -> bytes:
        """Return the presented bytes of a piece; pure, a thread may do it.  Raises SourceDamaged."""

    def assemble(self, piece: Piece, presented: bytes) -> list[tuple[int, bytes]]:
        """Take what `decode` returned; return each chunk that is complete with it, and its bytes."""

    @property
    def half_complete(self) -> Collection[int]:
        """Chunks that some of their pieces were kept for."""

    def forget(self, chunk: int) -> None:
        """Nobody waits for the chunk any more, and no flight brings its pieces."""

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

    @property
    def is_streamable(self) -> bool:
        return True

    def missing_tables(self, chunks: Sequence[int]) -> list[Piece]:
        return []

    def give_table(self, piece: Piece, data: bytes) -> None:
        raise AssertionError("a stored view has no tables")

    def tables_of(self, chunks: Sequence[int]) -> list[Piece]:
        return []

    def forget_table(self, piece: Piece) -> None:
        raise AssertionError("a stored view has no tables")

    def plan(self, chunk: int) -> list[Piece]:
        start, stop = chunk_range(chunk, self._size_bytes)
        return [Piece(start, stop, start, stop)]

    def decode(self, piece: Piece, data: bytes) -> bytes:
        return data

    def assemble(self, piece: Piece, presented: bytes) -> list[tuple[int, bytes]]:
        return [(piece.presented_start // CHUNK_SIZE_BYTES, presented)]

    @property
    def half_complete(self) -> Collection[int]:
        return ()

    def forget(self, chunk: int) -> None:
        """A chunk of one piece is never half complete."""

    def stream_pieces(self) -> Iterator[Piece]:
        return (piece for chunk in range(chunk_count(self._size_bytes)) for piece in self.plan(chunk))
