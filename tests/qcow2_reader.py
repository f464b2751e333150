"""A whole qcow2 read through lazyimg.core.qcow2 as a view would, with the source's bytes in memory."""

from __future__ import annotations

from collections.abc import Iterator

from lazyimg.core.qcow2 import (
    HEADER_BYTES_MAX,
    Compressed,
    Data,
    Extent,
    Header,
    Mapping,
    decode_cluster,
    parse_header,
)


class SourceReader:
    """Reads guest bytes; fetches from the source only what the mapping asks for."""

    def __init__(self, source: bytes, tables_bytes_max: int = 1 << 20) -> None:
        self.source = source
        self.header: Header = parse_header(source[:HEADER_BYTES_MAX], len(source))
        self.mapping = Mapping(self.header, tables_bytes_max)
        self.mapping.give_l1(self._fetch(*self.mapping.l1_range))

    def extents(self, start: int, stop: int) -> list[Extent]:
        """Return the extents of a guest range of at most `mappable_bytes_max`, fetching the tables it needs."""
        for table_start, table_stop in self.mapping.missing_tables(start, stop):
            self.mapping.give_table(table_start, self._fetch(table_start, table_stop))
        assert self.mapping.missing_tables(start, stop) == []
        extents = self.mapping.extents(start, stop)
        self._check_cover(extents, start, stop)
        return extents

    def read(self, start: int, stop: int) -> bytes:
        """Return the guest's bytes `[start, stop)`."""
        found = bytearray()
        for extent in self.extents(start, stop):
            data = self._content(extent)
            found += data[max(start - extent.start, 0) : min(stop, extent.stop) - extent.start]
        return bytes(found)

    def windows(self, length_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of at most `length_bytes` that cover the disk."""
        size_bytes = self.header.virtual_size_bytes
        for start in range(0, size_bytes, length_bytes):
            yield start, min(start + length_bytes, size_bytes)

    def read_all(self, length_bytes: int = 1 << 20) -> bytes:
        """Return the whole disk, read in windows."""
        return b"".join(self.read(start, stop) for start, stop in self.windows(length_bytes))

    def all_extents(self) -> list[Extent]:
        """Return the extents of the whole disk, mapped at once."""
        return self.extents(0, self.header.virtual_size_bytes)

    def _content(self, extent: Extent) -> bytes:
        if isinstance(extent, Data):
            return self._fetch(extent.source_start, extent.source_start + extent.stop - extent.start)
        if isinstance(extent, Compressed):
            cluster = decode_cluster(self.header, self._fetch(extent.source_start, extent.source_stop))
            assert len(cluster) == self.header.cluster_size_bytes
            return cluster
        return bytes(extent.stop - extent.start)

    def _fetch(self, start: int, stop: int) -> bytes:
        assert 0 <= start <= stop <= len(self.source), "nothing outside the source may be asked for"
        return self.source[start:stop]

    def _check_cover(self, extents: list[Extent], start: int, stop: int) -> None:
        """Extents join without gaps and cover the range; only compressed clusters reach beyond it."""
        position = start
        for extent in extents:
            if isinstance(extent, Compressed):
                assert extent.start <= position < extent.stop <= self.header.virtual_size_bytes
                assert extent.start % self.header.cluster_size_bytes == 0
            else:
                assert extent.start == position
                assert extent.start < extent.stop <= stop
            position = extent.stop
        assert position >= stop
