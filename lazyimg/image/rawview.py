"""The guest's bytes of a qcow2 source, decoded as they are read.

A chunk may need several pieces (small clusters, subclusters), and a piece may complete several chunks (large
compressed clusters); what has arrived of a chunk is kept until the rest has.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from lazyimg.core.chunks import chunk_range, chunks_of
from lazyimg.core.fetchplan import Piece
from lazyimg.core.qcow2 import Compressed, Data, Extent, Header, Mapping, Zero, decode_cluster
from lazyimg.errors import SourceDamaged


@dataclass(slots=True)
class _Assembly:
    """A chunk some of whose pieces have not arrived; what no piece brings is zeros already."""

    data: bytearray
    missing: dict[Piece, None]


class Qcow2View:
    """A qcow2 source as a raw image."""

    def __init__(self, header: Header, tables_bytes_max: int) -> None:
        """tables_bytes_max: of L2 tables kept in memory."""
        self._header = header
        self._mapping = Mapping(header, tables_bytes_max)
        self._assemblies: dict[int, _Assembly] = {}
        self._l1 = Piece(*self._mapping.l1_range)
        self._is_l1_known = False
        if self._l1.start == self._l1.stop:
            self.give_table(self._l1, b"")

    @property
    def size_bytes(self) -> int:
        return self._header.virtual_size_bytes

    @property
    def source_size_bytes(self) -> int:
        return self._header.source_size_bytes

    @property
    def is_streamable(self) -> bool:
        return False

    def missing_tables(self, chunks: Sequence[int]) -> list[Piece]:
        if not self._is_l1_known:
            return [self._l1]
        missing: dict[Piece, None] = {}
        for chunk in chunks:
            for table in self._mapping.missing_tables(*chunk_range(chunk, self.size_bytes)):
                missing[Piece(*table)] = None
        return list(missing)

    def give_table(self, piece: Piece, data: bytes) -> None:
        if piece == self._l1:
            self._mapping.give_l1(data)
            self._is_l1_known = True
        else:
            self._mapping.give_table(piece.start, data)

    def tables_of(self, chunks: Sequence[int]) -> list[Piece]:
        if not self._is_l1_known:
            return []
        tables = {self._l1: None} if self._l1.start < self._l1.stop else {}
        for chunk in chunks:
            try:
                for table in self._mapping.tables_of(*chunk_range(chunk, self.size_bytes)):
                    tables[Piece(*table)] = None
            except SourceDamaged:
                # Its entry in the L1 table is the damage.
                continue
        return list(tables)

    def forget_table(self, piece: Piece) -> None:
        if piece == self._l1:
            self._mapping.forget_l1()
            self._is_l1_known = False
        else:
            self._mapping.forget_table(piece.start)

    def plan(self, chunk: int) -> list[Piece]:
        assembly = self._assemblies.get(chunk)
        if assembly is not None:
            return list(assembly.missing)
        start, stop = chunk_range(chunk, self.size_bytes)
        pieces, _ = self.parts(chunk)
        is_whole = (
            len(pieces) == 1 and pieces[0].presented_start <= start and pieces[0].presented_stop >= stop
        )
        if pieces and not is_whole:
            self._assemblies[chunk] = _Assembly(bytearray(stop - start), dict.fromkeys(pieces))
        return pieces

    def parts(self, chunk: int) -> tuple[list[Piece], list[tuple[int, int]]]:
        """Return all pieces that a chunk comes from, and its ranges that are zeros and come from none."""
        extents = self._mapping.extents(*chunk_range(chunk, self.size_bytes))
        zeros = [(extent.start, extent.stop) for extent in extents if isinstance(extent, Zero)]
        return [piece for extent in extents for piece in self._pieces(extent)], zeros

    def decode(self, piece: Piece, data: bytes) -> bytes:
        return decode_cluster(self._header, data) if piece.is_compressed else data

    def assemble(self, piece: Piece, presented: bytes) -> list[tuple[int, bytes]]:
        start, stop = piece.presented_start, piece.presented_stop
        complete: list[tuple[int, bytes]] = []
        for chunk in chunks_of(start, stop):
            chunk_start, chunk_stop = chunk_range(chunk, self.size_bytes)
            if start <= chunk_start and chunk_stop <= stop:
                self._assemblies.pop(chunk, None)
                complete.append((chunk, presented[chunk_start - start : chunk_stop - start]))
                continue
            assembly = self._assemblies.get(chunk)
            if assembly is None or piece not in assembly.missing:
                continue
            part_start, part_stop = max(start, chunk_start), min(stop, chunk_stop)
            part = presented[part_start - start : part_stop - start]
            assembly.data[part_start - chunk_start : part_stop - chunk_start] = part
            del assembly.missing[piece]
            if not assembly.missing:
                del self._assemblies[chunk]
                complete.append((chunk, bytes(assembly.data)))
        return complete

    @property
    def half_complete(self) -> Collection[int]:
        return self._assemblies.keys()

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
