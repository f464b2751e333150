"""Reading qcow2: where the guest's bytes lie in the source, and what a compressed cluster holds.

Pure: bytes in, values out.  Every byte of a source may be hostile; nothing but ImageRefused and SourceDamaged
comes out, within time and memory that the sizes asked for bound.  Sections cited are those of qemu's
docs/interop/qcow2.txt.

    header = parse_header(head, source_size_bytes)         refuses what must not be presented
    mapping = Mapping(header)
    mapping.give_l1(source[l1_start:l1_stop])              once
    while missing := mapping.missing_tables(start, stop):
        mapping.give_table(table_start, source[table_start:table_stop])   for each
    mapping.extents(start, stop)                           Data, Zero and Compressed, in order
    decode_cluster(header, source[source_start:source_stop])              for each Compressed
"""

from lazyimg.core.qcow2.clusters import decode_cluster
from lazyimg.core.qcow2.header import HEADER_BYTES_MAX, Header, parse_header
from lazyimg.core.qcow2.mapping import Compressed, Data, Extent, Mapping, Zero

__all__ = [
    "HEADER_BYTES_MAX",
    "Compressed",
    "Data",
    "Extent",
    "Header",
    "Mapping",
    "Zero",
    "decode_cluster",
    "parse_header",
]
