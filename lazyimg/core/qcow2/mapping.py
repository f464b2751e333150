"""Where the guest's bytes lie in the source, by the L1 table and the L2 tables given so far.

Pure.  An entry is judged when a range asks for it, not when its table arrives: a table of 262,144 entries costs
nothing until it is used, and one bad entry takes from the guest what it maps and no more, as in qemu.

    L1 entry   63: refcount is 1 (ignored)   62…56: 0   55…9: L2 table's offset, 0: nothing there    8…0: 0
    L2 entry   63: refcount is 1 (ignored)   62: compressed   then, if not compressed (§ Cluster mapping),
               61…56: 0   55…9: cluster's offset, 0: unallocated   8…1: 0   0: reads as zeros (version 3)
               or, if compressed, with x = 62 - (cluster_bits - 8),
               61…x: sectors after the first   x-1…0: offset, in bytes
    extended   a second word for each entry: 63…32: reads as zeros   31…0: allocated, a bit for each of 32
               subclusters, the lowest first (§ Extended L2 Entries)
"""

from __future__ import annotations

import sys
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from lazyimg.core.qcow2.header import L1_ENTRY_BYTES, SECTOR_BYTES, Header
from lazyimg.errors import SourceDamaged

# Kept however little memory is given.
_TABLES_MIN = 4

_COMPRESSED = 1 << 62
_OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
_READS_AS_ZEROS = 1
_L1_RESERVED = 0x7F00_0000_0000_01FF
_L2_RESERVED = 0x3F00_0000_0000_01FE
_SUBCLUSTERS = 32
_ALL_SUBCLUSTERS = (1 << _SUBCLUSTERS) - 1


class Data(NamedTuple):
    """Guest bytes `[start, stop)` that lie in the source from `source_start` on, as they are."""

    start: int
    stop: int
    source_start: int


class Zero(NamedTuple):
    """Guest bytes `[start, stop)` that read as zeros: there is nothing to fetch."""

    start: int
    stop: int


class Compressed(NamedTuple):
    """One whole guest cluster `[start, stop)`, cut at the disk's end, that `[source_start, source_stop)` decodes to.

    The source range ends with a sector, in which the next compressed cluster may already begin.
    """

    start: int
    stop: int
    source_start: int
    source_stop: int


Extent = Data | Zero | Compressed


class Mapping:
    """The mapping of one source; keeps its L1 table, and the L2 tables used last in `tables_bytes_max`.

    Ranges of the guest end at `header.virtual_size_bytes` at most.
    """

    def __init__(self, header: Header, tables_bytes_max: int) -> None:
        self._header = header
        self._l1: array[int] | None = None
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._tables_max = max(tables_bytes_max // header.cluster_size_bytes, _TABLES_MIN)
        # Bit 0 has no meaning in version 2 and with subclusters.
        has_zero_bit = header.version > 2 and not header.has_subclusters
        self._reserved = _L2_RESERVED if has_zero_bit else _L2_RESERVED | _READS_AS_ZEROS
        self._sectors_shift = 62 - (header.cluster_bits - 8)

    @property
    def mappable_bytes_max(self) -> int:
        """Longest guest range whose tables are kept together: map what is longer in parts."""
        return (self._tables_max - 1) * self._header.table_span_bytes

    @property
    def l1_range(self) -> tuple[int, int]:
        """The L1 table's source bytes `[start, stop)`; empty for a disk of no bytes."""
        return self._header.l1_start, self._header.l1_stop

    def give_l1(self, data: bytes) -> None:
        """Take the source's bytes in `l1_range`, which has 4 million entries at most."""
        l1 = _words(data)
        assert len(l1) == self._header.l1_entries, "not the L1 table"
        self._l1 = l1

    def forget_l1(self) -> None:
        """Have the L1 table given again."""
        self._l1 = None

    def missing_tables(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the source ranges of the L2 tables that `[start, stop)` needs and that were not given, or not kept.

        For a range of at most `mappable_bytes_max`, `extents` can follow once these are given.  Raises SourceDamaged
        if the L1 table's entry for it points outside the source, into the header or into the L1 table.
        """
        missing = {}
        for _, _, table_start in self._parts_of(start, stop):
            if table_start in self._tables:
                self._tables.move_to_end(table_start)
            elif table_start:
                missing[table_start] = table_start + self._header.cluster_size_bytes
        return list(missing.items())

    def tables_of(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the source ranges of all L2 tables that `[start, stop)` needs.  Raises as `missing_tables` does."""
        size_bytes = self._header.cluster_size_bytes
        return [(at, at + size_bytes) for _, _, at in self._parts_of(start, stop) if at]

    def give_table(self, start: int, data: bytes) -> None:
        """Take an L2 table: the source's bytes in a range that `missing_tables` named."""
        assert len(data) == self._header.cluster_size_bytes, "not an L2 table"
        self._tables[start] = _words(data)
        self._tables.move_to_end(start)
        while len(self._tables) > self._tables_max:
            self._tables.popitem(last=False)

    def forget_table(self, start: int) -> None:
        """Have an L2 table given again."""
        self._tables.pop(start, None)

    def extents(self, start: int, stop: int) -> list[Extent]:
        """Return what makes up the guest's `[start, stop)`, in order and without gaps; no table may be missing.

        Data and Zero are cut to the range and as long as they can be; Compressed reaches beyond it to whole
        clusters.  Raises SourceDamaged if an entry of these clusters is not what the format allows.
        """
        found: list[Extent] = []
        for part_start, part_stop, table_start in self._parts_of(start, stop):
            if not table_start:
                _append(found, Zero(part_start, part_stop))
                continue
            self._tables.move_to_end(table_start)
            for extent in self._extents_of_table(self._tables[table_start], part_start, part_stop):
                _append(found, extent)
        return found

    def next_compressed_start(self, cluster_start: int) -> int | None:
        """Return where the compressed cluster of the guest's byte `cluster_start` begins in the source.

        None if that cluster is not compressed.  Its table must not be missing.  The entry is not judged.
        """
        header = self._header
        table_start = self._table_start(cluster_start // header.table_span_bytes)
        if not table_start:
            return None
        place = cluster_start % header.table_span_bytes // header.cluster_size_bytes
        entry = self._tables[table_start][place * (header.l2_entry_bytes // 8)]
        return entry & ((1 << self._sectors_shift) - 1) if entry & _COMPRESSED else None

    def _table_start(self, index: int) -> int:
        """Return where an L2 table begins in the source, 0 where there is none."""
        assert self._l1 is not None, "the L1 table comes first"
        entry = self._l1[index]
        header, size_bytes = self._header, self._header.cluster_size_bytes
        if entry & (_L1_RESERVED | (size_bytes - 1)):
            raise _damaged(f"L1 table has the entry {entry:#018x}")
        # Whatever is not 0 lies behind the header now, which is in the first cluster.
        start = entry & _OFFSET_MASK
        if start > header.source_size_bytes - size_bytes:
            raise _damaged(f"L1 table places an L2 table at byte {start} of {header.source_size_bytes}")
        if start and self._overlaps_l1(start, start + size_bytes):
            raise _damaged("L1 table places an L2 table in itself")
        return start

    def _parts_of(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield each table's part of a guest range and the table's place in the source, 0 where there is none."""
        assert 0 <= start <= stop <= self._header.virtual_size_bytes
        if start == stop:
            return
        span = self._header.table_span_bytes
        for index in range(start // span, -(-stop // span)):
            yield max(start, index * span), min(stop, (index + 1) * span), self._table_start(index)

    def _extents_of_table(self, table: array[int], start: int, stop: int) -> Iterator[Extent]:
        size_bytes = self._header.cluster_size_bytes
        words_per_entry = self._header.l2_entry_bytes // 8
        first = start % self._header.table_span_bytes // size_bytes * words_per_entry
        for cluster_start in range(start // size_bytes * size_bytes, stop, size_bytes):
            entry = table[first]
            bitmap = table[first + 1] if words_per_entry == 2 else None
            first += words_per_entry
            if entry & _COMPRESSED:
                yield self._compressed(entry, bitmap, cluster_start)
                continue
            for extent in self._standard(entry, bitmap, cluster_start):
                # The range may begin or end within the cluster.
                cut_start, cut_stop = max(extent.start, start), min(extent.stop, stop)
                if cut_start >= cut_stop:
                    continue
                if isinstance(extent, Data):
                    yield Data(cut_start, cut_stop, extent.source_start + cut_start - extent.start)
                else:
                    yield Zero(cut_start, cut_stop)

    def _compressed(self, entry: int, bitmap: int | None, cluster_start: int) -> Compressed:
        header = self._header
        source_start = entry & ((1 << self._sectors_shift) - 1)
        sectors = ((entry & (_COMPRESSED - 1)) >> self._sectors_shift) + 1
        source_stop = source_start // SECTOR_BYTES * SECTOR_BYTES + sectors * SECTOR_BYTES
        self._check_place(source_start, source_stop, cluster_start)
        if bitmap:
            raise _damaged(f"entry for the guest's byte {cluster_start} is compressed and has subclusters")
        return Compressed(
            cluster_start,
            min(cluster_start + header.cluster_size_bytes, header.virtual_size_bytes),
            source_start,
            # A file may end with its last byte instead of its last sector.
            min(source_stop, header.source_size_bytes),
        )

    def _standard(self, entry: int, bitmap: int | None, cluster_start: int) -> list[Data | Zero]:
        """Return what makes up a cluster that is not compressed."""
        size_bytes = self._header.cluster_size_bytes
        cluster_stop = cluster_start + size_bytes
        source_start = entry & _OFFSET_MASK
        if entry & self._reserved or source_start % size_bytes:
            raise _damaged(f"entry for the guest's byte {cluster_start} is {entry:#018x}")
        if bitmap is not None:
            return self._subclusters(source_start, bitmap, cluster_start)
        if not source_start or entry & _READS_AS_ZEROS:
            return [Zero(cluster_start, cluster_stop)]
        return self._data(source_start, cluster_start, cluster_stop, cluster_start)

    def _subclusters(self, source_start: int, bitmap: int, cluster_start: int) -> list[Data | Zero]:
        allocated, zeros = bitmap & _ALL_SUBCLUSTERS, bitmap >> _SUBCLUSTERS
        if allocated & zeros or (allocated and not source_start):
            raise _damaged(f"entry for the guest's byte {cluster_start} has subclusters {bitmap:#018x}")
        if not allocated:
            return [Zero(cluster_start, cluster_start + self._header.cluster_size_bytes)]
        if allocated == _ALL_SUBCLUSTERS:
            stop = cluster_start + self._header.cluster_size_bytes
            return self._data(source_start, cluster_start, stop, cluster_start)
        part_bytes = self._header.cluster_size_bytes // _SUBCLUSTERS
        found: list[Data | Zero] = []
        for start in range(cluster_start, cluster_start + self._header.cluster_size_bytes, part_bytes):
            if allocated & 1:
                found += self._data(source_start, start, start + part_bytes, cluster_start)
            else:
                found.append(Zero(start, start + part_bytes))
            allocated >>= 1
        return found

    def _data(self, source_start: int, start: int, stop: int, cluster_start: int) -> list[Data | Zero]:
        """Return guest bytes `[start, stop)` of a cluster that lies at `source_start`."""
        self._check_place(source_start, source_start + self._header.cluster_size_bytes, cluster_start)
        # A file may end within its last cluster; qemu reads zeros there, and its checker allows it
        # (block/qcow2-refcount.c, "may be semi-allocated").
        present_stop = cluster_start + self._header.source_size_bytes - source_start
        data = Data(start, min(stop, present_stop), source_start + start - cluster_start)
        if stop <= present_stop:
            return [data]
        if start >= present_stop:
            return [Zero(start, stop)]
        return [data, Zero(present_stop, stop)]

    def _check_place(self, source_start: int, source_stop: int, cluster_start: int) -> None:
        """Raise if a cluster cannot lie in `[source_start, source_stop)`.

        qemu reads zeros past the source's end; where that is a cluster or more, it is one that was cut short, and
        zeros would be wrong bytes.
        """
        size_bytes = self._header.cluster_size_bytes
        beyond_bytes = source_stop - self._header.source_size_bytes
        if (
            source_start >= self._header.source_size_bytes
            or beyond_bytes >= size_bytes
            or source_start < size_bytes
            or self._overlaps_l1(source_start, source_stop)
        ):
            place = f"[{source_start}, {source_stop}) of {self._header.source_size_bytes}"
            raise _damaged(f"entry for the guest's byte {cluster_start} points to bytes {place}")

    def _overlaps_l1(self, start: int, stop: int) -> bool:
        return start < self._header.l1_stop and self._header.l1_start < stop


def _damaged(reason: str) -> SourceDamaged:
    return SourceDamaged(f"its qcow2 {reason}; check it with qemu-img check and upload it again")


def _words(data: bytes) -> array[int]:
    """Return the big-endian 64-bit words of a table."""
    words = array("Q", data)
    assert words.itemsize == L1_ENTRY_BYTES
    if sys.byteorder == "little":
        words.byteswap()
    return words


def _append(found: list[Extent], extent: Extent) -> None:
    """Add an extent, or lengthen the last one by it where both are one in guest and source."""
    last = found[-1] if found else None
    if isinstance(extent, Zero) and isinstance(last, Zero):
        found[-1] = Zero(last.start, extent.stop)
    elif (
        isinstance(extent, Data)
        and isinstance(last, Data)
        and last.source_start + last.stop - last.start == extent.source_start
    ):
        found[-1] = Data(last.start, extent.stop, last.source_start)
    else:
        found.append(extent)
