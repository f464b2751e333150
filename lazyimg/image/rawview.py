"""The guest's bytes of a qcow2 source, decoded as they are read.

A chunk may need several pieces (small clusters, subclusters), and a piece may complete several chunks (large
compressed clusters); what has arrived of a chunk is kept until the rest has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lazyimg.core.chunks import chunk_range, chunks_of
from lazyimg.core.fetchplan import Piece
from lazyimg.core.qcow2 import Compressed, Data, Extent, Header, Mapping, decode_cluster


@dataclass(slots=True)
class _Assembly:
    """A chunk some of whose pieces have not arrived; what no piece brings is zeros already."""

    data: bytearray
    missing: dict[Piece, None]


class Qcow2View:
    """A qcow2 source as a raw image."""

    def __init__(self, header: Header, head: bytes = b"") -> None:
        """head: the source's first bytes, as many as are at hand; tables that lie in them are not missing."""
        self._header = header
        self._mapping = Mapping(header)
        self._is_l1_known = False
        self._assemblies: dict[int, _Assembly] = {}
        l1_start, l1_stop = self._mapping.l1_range
        if l1_stop <= len(head) or l1_start == l1_stop:
            self._mapping.give_l1(head[l1_start:l1_stop])
            self._is_l1_known = True
            self._take_tables_in(head)

    @property
    def size_bytes(self) -> int:
        return self._header.virtual_size_bytes

    @property
    def source_size_bytes(self) -> int:
        return self._header.source_size_bytes

    def missing_tables(self, chunks: Sequence[int]) -> list[Piece]:
        if not self._is_l1_known:
            return [Piece(*self._mapping.l1_range)]
        missing: dict[Piece, None] = {}
        for chunk in chunks:
            for table in self._mapping.missing_tables(*chunk_range(chunk, self.size_bytes)):
                missing[Piece(*table)] = None
        return list(missing)

    def give_table(self, piece: Piece, data: bytes) -> None:
        if (piece.start, piece.stop) == self._mapping.l1_range:
            self._mapping.give_l1(data)
            self._is_l1_known = True
        else:
            self._mapping.give_table(piece.start, data)

    def plan(self, chunk: int) -> list[Piece]:
        assembly = self._assemblies.get(chunk)
        if assembly is not None:
            return list(assembly.missing)
        start, stop = chunk_range(chunk, self.size_bytes)
        pieces = [piece for extent in self._mapping.extents(start, stop) for piece in self._pieces(extent)]
        is_whole = (
            len(pieces) == 1 and pieces[0].presented_start <= start and pieces[0].presented_stop >= stop
        )
        if pieces and not is_whole:
            self._assemblies[chunk] = _Assembly(bytearray(stop - start), dict.fromkeys(pieces))
        return pieces

    def decode(self, piece: Piece, data: bytes) -> list[tuple[int, bytes]]:
        start, stop = piece.presented_start, piece.presented_stop
        if piece.is_compressed:
            data = decode_cluster(self._header, data)
        complete: list[tuple[int, bytes]] = []
        for chunk in chunks_of(start, stop):
            chunk_start, chunk_stop = chunk_range(chunk, self.size_bytes)
            if start <= chunk_start and chunk_stop <= stop:
                self._assemblies.pop(chunk, None)
                complete.append((chunk, data[chunk_start - start : chunk_stop - start]))
                continue
            assembly = self._assemblies.get(chunk)
            if assembly is None or piece not in assembly.missing:
                continue
            part_start, part_stop = max(start, chunk_start), min(stop, chunk_stop)
            part = data[part_start - start : part_stop - start]
            assembly.data[part_start - chunk_start : part_stop - chunk_start] = part
            del assembly.missing[piece]
            if not assembly.missing:
                del self._assemblies[chunk]
                complete.append((chunk, bytes(assembly.data)))
        return complete

    @property
    def half_complete(self) -> list[int]:
        return list(self._assemblies)

    def forget(self, chunk: int) -> None:
        self._assemblies.pop(chunk, None)

    def stream_pieces(self) -> Iterator[Piece]:
        raise AssertionError("a decoded source is read in ranges, of Glance or of its spool")

    def _pieces(self, extent: Extent) -> Iterator[Piece]:
        if isinstance(extent, Compressed):
            yield Piece(
                extent.source_start, self._end_of(extent), extent.start, extent.stop, is_compressed=True
            )
        elif isinstance(extent, Data):
            source_stop = extent.source_start + extent.stop - extent.start
            yield Piece(extent.source_start, source_stop, extent.start, extent.stop)

    def _end_of(self, extent: Compressed) -> int:
        """Return where a compressed cluster ends at the latest: in its last sector, but before the next begins.

        Writers put them one behind the other, so that neighbours, cut so, go by one request.  The next one's
        place is looked at only where the same table has it: a piece must be cut alike each time.
        """
        if extent.stop % self._header.table_span_bytes == 0 or extent.stop >= self.size_bytes:
            return extent.source_stop
        following = self._mapping.next_compressed_start(extent.stop)
        if following is not None and extent.source_start < following < extent.source_stop:
            return following
        return extent.source_stop

    def _take_tables_in(self, head: bytes) -> None:
        """Give the mapping those tables that lie in the source's first bytes, as far as it keeps them."""
        stop = min(self.size_bytes, self._mapping.mappable_bytes_max)
        for start, table_stop in self._mapping.missing_tables(0, stop):
            if table_stop <= len(head):
                self._mapping.give_table(start, head[start:table_stop])
