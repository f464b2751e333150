"""One pass over a decoded image's source, from its first byte to its last: is what is stored what it decodes to?

Synchronous, for threads; knows nothing of Glance.  The hash that Glance states is of the source, so that only the
source's bytes in their order can be compared with it; on the way each piece is decoded and compared with what is
stored of it, and each table with the one by which it was decoded.  Memory is bounded: of the source's pieces some
`PIECES_MAX` are known at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Protocol

from lazyimg.core.chunks import chunk_count
from lazyimg.core.fetchplan import Piece
from lazyimg.core.header import HEAD_SIZE_BYTES
from lazyimg.core.identity import ImageRecord
from lazyimg.core.qcow2 import parse_header
from lazyimg.errors import SourceDamaged
from lazyimg.image.rawview import Qcow2View

# Pieces and tables known at a time, some 16 MB of them.
PIECES_MAX = 1 << 16
# Mapped by one call of `plan`: some milliseconds of the interpreter.
PART_CHUNKS = 256
TABLES_BYTES_MAX = 4 << 20


class StoredImage(Protocol):
    """What is compared; both block."""

    def stored(self, start: int, stop: int) -> bytes:
        """Return presented bytes.  Raises ChunkAbsent, ChunkDamaged or OSError."""

    def table(self, start: int, stop: int) -> bytes | None:
        """Return a part of the source that was kept as a table."""


class PassImpossible(Exception):
    """The tables are not here, or such that a pass would need too much memory; the message says which."""


class SourcePass:
    """One pass; `plan` whenever the source was fed up to `planned_stop`, `feed` its bytes in order."""

    def __init__(self, record: ImageRecord, image: StoredImage, *, pieces_max: int = PIECES_MAX) -> None:
        """Begin (thread).  Raises PassImpossible."""
        assert record.source_hash is not None
        self._image = image
        self._pieces_max = pieces_max
        self._size_bytes = record.size_bytes or 0
        self._digest = hashlib.new(record.source_hash[0], usedforsecurity=False)
        self._head = Piece(0, min(self._size_bytes, HEAD_SIZE_BYTES))
        head = image.table(self._head.start, self._head.stop)
        if head is None:
            raise PassImpossible(f"image {record.id}: its header is not in the cache")
        self._head_bytes = head
        self._view = Qcow2View(parse_header(head, self._size_bytes), TABLES_BYTES_MAX)
        # In the source's order, from `_next` on; those before were compared.
        self._pieces: list[Piece] = []
        self._next = 0
        # Bytes fed and still needed, and where they begin.
        self._held = bytearray()
        self._held_start = 0
        self.fed_stop = 0
        # All pieces that begin before this are known.
        self.planned_stop = 0
        # What was found first that is not as it is stored.
        self.difference: str | None = None

    @property
    def is_over(self) -> bool:
        return self.fed_stop == self._size_bytes

    def hexdigest(self) -> str:
        """Return the hash of what was fed."""
        return self._digest.hexdigest()

    def plan(self) -> Iterator[None]:
        """Learn the pieces that come next, a part of the image at each step (thread)."""
        start, stop = self.planned_stop, self._size_bytes
        found: set[Piece] = set()
        if not start:
            found.add(self._head)
        for first in range(0, chunk_count(self._view.size_bytes), PART_CHUNKS):
            chunks = range(first, min(first + PART_CHUNKS, chunk_count(self._view.size_bytes)))
            found |= {
                piece for piece in self._pieces_of(chunks, is_first=not start) if start <= piece.start < stop
            }
            # Seldom, since it takes long.
            if len(found) > 2 * self._pieces_max:
                kept = sorted(found)
                stop = kept[self._pieces_max].start
                found = {piece for piece in kept if piece.start < stop}
                if not found:
                    raise PassImpossible(f"{len(kept)} parts of the image come from one of its source")
            yield
        # Those that begin before and are not wholly fed come first.
        self._pieces = self._pieces[self._next :] + sorted(found)
        self._next = 0
        self.planned_stop = stop

    def feed(self, data: bytes) -> None:
        """Take the source's next bytes, not beyond `planned_stop`, and compare what is complete with them (thread)."""
        self._digest.update(data)
        self._held += data
        self.fed_stop += len(data)
        assert self.fed_stop <= self.planned_stop
        while self._next < len(self._pieces) and self._pieces[self._next].stop <= self.fed_stop:
            piece = self._pieces[self._next]
            self._next += 1
            self._compare(
                piece,
                bytes(memoryview(self._held)[piece.start - self._held_start :][: piece.stop - piece.start]),
            )
        needed = self._pieces[self._next].start if self._next < len(self._pieces) else self.fed_stop
        needless = min(needed, self.fed_stop) - self._held_start
        if needless > 0:
            del self._held[:needless]
            self._held_start += needless

    def _pieces_of(self, chunks: range, *, is_first: bool) -> Iterator[Piece]:
        """Yield the tables and pieces of some chunks; at the first look compare what comes from none."""
        while missing := self._view.missing_tables(list(chunks)):
            for table in missing:
                self._view.give_table(table, self._kept(table))
        yield from self._view.tables_of(list(chunks))
        for chunk in chunks:
            pieces, zeros = self._view.parts(chunk)
            yield from pieces
            for start, stop in zeros if is_first else ():
                if any(self._image.stored(start, stop)):
                    self._differs(start, stop, "zeros in the source")

    def _kept(self, table: Piece) -> bytes:
        data = self._image.table(table.start, table.stop)
        if data is None and table.stop <= self._head.stop:
            data = self._head_bytes[table.start : table.stop]
        if data is None:
            raise PassImpossible(f"its table at byte {table.start} is not in the cache")
        return data

    def _compare(self, piece: Piece, data: bytes) -> None:
        if piece.presented_start == piece.presented_stop:
            if data != self._kept(piece):
                self._differs(piece.start, piece.stop, "a table that is another in the source")
            return
        stop = min(piece.presented_stop, self._view.size_bytes)
        stored = self._image.stored(piece.presented_start, stop)
        try:
            if self._view.decode(piece, data)[: len(stored)] != stored:
                self._differs(piece.presented_start, stop, "other bytes in the source")
        except SourceDamaged as exc:
            self._differs(piece.presented_start, stop, str(exc))

    def _differs(self, start: int, stop: int, what: str) -> None:
        if self.difference is None:
            self.difference = f"bytes {start} to {stop}: {what}"
