"""The qcow2 header: what the source is, or why it must not be presented decoded.

Pure.  Guards that qemu and we read one image alike: what only another file, a key, a repair or a later format
could read rightly is refused, and so is what qemu refuses.  Snapshots, refcounts and header extensions are not
looked at: what the guest sees now does not depend on them.

     byte  0  magic 'QFI\\xfb'             40  L1 table's offset         version 3 has more:
           4  version                     48  refcount table's offset     72  incompatible features
           8  backing file's offset       56  … and its clusters          80  compatible features
          16  … and its name's length     60  number of snapshots         88  autoclear features
          20  cluster bits                64  their table's offset        96  refcount order
          24  virtual size                                               100  header length
          32  encryption                                                 104  compression type,
          36  L1 table's entries                                              where the length covers it

All big-endian (§ Header).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Literal

from lazyimg.errors import ImageRefused

Compression = Literal["deflate", "zstd"]
_DEFLATE: Compression = "deflate"
_ZSTD: Compression = "zstd"

# Nothing beyond is looked at; a caller that has more bytes may give them.
HEADER_BYTES_MAX = 112

_MAGIC = b"QFI\xfb"
_FIELDS = struct.Struct(">4sIQIIQIIQQIIQ")
_FIELDS_VERSION_3 = struct.Struct(">QQQII")
_HEADER_BYTES_MIN = {2: _FIELDS.size, 3: _FIELDS.size + _FIELDS_VERSION_3.size}

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION_TYPE, _EXTENDED_L2 = (1 << bit for bit in range(5))
_FEATURES_KNOWN = _COMPRESSION_TYPE | _EXTENDED_L2

_CLUSTER_BITS = range(9, 22)
# § Header, cluster_bits: a 32nd of a cluster must be a sector at least.
_CLUSTER_BITS_EXTENDED = range(14, 22)
# qemu's QCOW_MAX_L1_SIZE and the largest file offset; beyond them qemu does not open an image either.
_L1_BYTES_MAX = 32 << 20
_VIRTUAL_SIZE_BYTES_MAX = (1 << 63) - 1
_REFCOUNT_ORDER_MAX = 6
SECTOR_BYTES = 512
L1_ENTRY_BYTES = 8

_CONVERT = "convert it with qemu-img convert and upload that"
_REPAIR = "repair it with qemu-img check -r all and upload that"
_UPLOAD_AGAIN = "upload all of it again"


@dataclass(frozen=True, slots=True)
class Header:
    """What of the header reading the guest's bytes needs, checked.

    l1_entries: those that map the disk; more may follow them in the source, for saved machine states.
    has_subclusters: extended L2 entries, in which each cluster has 32 parts.
    """

    version: int
    cluster_bits: int
    virtual_size_bytes: int
    source_size_bytes: int
    l1_start: int
    l1_entries: int
    has_subclusters: bool
    compression: Compression

    @property
    def cluster_size_bytes(self) -> int:
        """A cluster, and so an L2 table too (§ Cluster mapping)."""
        return 1 << self.cluster_bits

    @property
    def l2_entry_bytes(self) -> int:
        return _l2_entry_bytes(self.has_subclusters)

    @property
    def table_span_bytes(self) -> int:
        """Guest bytes that one L2 table maps."""
        return _table_span_bytes(self.cluster_bits, self.has_subclusters)

    @property
    def l1_stop(self) -> int:
        return self.l1_start + self.l1_entries * L1_ENTRY_BYTES


def parse_header(head: bytes, source_size_bytes: int) -> Header:
    """Return the header of a source of `source_size_bytes` that begins with `head`.

    head: its first `min(source_size_bytes, HEADER_BYTES_MAX)` bytes, or more.
    Internal snapshots are no reason to refuse: they have L1 tables of their own, and what the guest sees now
    is read without them.  Raises ImageRefused with reason and next step; the caller names the image.
    """
    if len(head) < _HEADER_BYTES_MIN[2] or not head.startswith(_MAGIC):
        raise _refused("source has no qcow2 header", _UPLOAD_AGAIN)
    (
        _, version, backing_start, _, cluster_bits, virtual_size_bytes, encryption,
        l1_entries, l1_start, refcount_start, refcount_clusters, _, _,
    ) = _FIELDS.unpack_from(head)  # fmt: skip
    if version not in _HEADER_BYTES_MIN:
        raise _refused(f"qcow2 is of version {version}, not 2 or 3", _CONVERT)
    if cluster_bits not in _CLUSTER_BITS:
        raise _refused(f"qcow2 header claims cluster_bits {cluster_bits}, not 9 to 21", _CONVERT)
    if backing_start != 0:
        raise _refused("qcow2 has a backing file", "flatten it with qemu-img convert and upload that")
    if encryption != 0:
        raise _refused("qcow2 content is encrypted", _CONVERT)
    has_subclusters, compression = _parse_version_3(head, cluster_bits) if version == 3 else (False, _DEFLATE)
    header = Header(
        version,
        cluster_bits,
        virtual_size_bytes,
        source_size_bytes,
        l1_start,
        -(-virtual_size_bytes // _table_span_bytes(cluster_bits, has_subclusters)),
        has_subclusters,
        compression,
    )
    _check_sizes(header, l1_entries)
    _check_places(header, l1_entries, refcount_start, refcount_clusters)
    return header


def _refused(reason: str, next_step: str) -> ImageRefused:
    return ImageRefused(f"its {reason}; {next_step}")


def _l2_entry_bytes(has_subclusters: bool) -> int:
    return 16 if has_subclusters else 8


def _table_span_bytes(cluster_bits: int, has_subclusters: bool) -> int:
    return ((1 << cluster_bits) // _l2_entry_bytes(has_subclusters)) << cluster_bits


def _parse_version_3(head: bytes, cluster_bits: int) -> tuple[bool, Compression]:
    """Return whether L2 entries are extended, and the compression, of a header of version 3."""
    if len(head) < _HEADER_BYTES_MIN[3]:
        raise _refused(f"qcow2 header ends after {len(head)} bytes", _UPLOAD_AGAIN)
    features, _, _, refcount_order, header_bytes = _FIELDS_VERSION_3.unpack_from(head, _FIELDS.size)
    if not _HEADER_BYTES_MIN[3] <= header_bytes <= 1 << cluster_bits:
        raise _refused(f"qcow2 header claims a length of {header_bytes} bytes", _CONVERT)
    if refcount_order > _REFCOUNT_ORDER_MAX:
        raise _refused(f"qcow2 header claims refcount_order {refcount_order}, not 0 to 6", _CONVERT)
    if features & (_DIRTY | _CORRUPT):
        raise _refused("qcow2 is marked dirty or corrupt", _REPAIR)
    if features & _DATA_FILE:
        raise _refused("qcow2 keeps its data in another file", _CONVERT)
    if unknown := features & ~_FEATURES_KNOWN:
        raise _refused(f"qcow2 needs features unknown here ({unknown:#x})", _CONVERT)
    has_subclusters = bool(features & _EXTENDED_L2)
    if has_subclusters and cluster_bits not in _CLUSTER_BITS_EXTENDED:
        raise _refused(f"qcow2 claims extended L2 entries with cluster_bits {cluster_bits}", _CONVERT)
    # § Additional fields: a field that the header's length does not reach is as if it were 0.
    covered = header_bytes > _HEADER_BYTES_MIN[3]
    if covered and len(head) <= _HEADER_BYTES_MIN[3]:
        raise _refused(f"qcow2 header ends after {len(head)} of {header_bytes} bytes", _UPLOAD_AGAIN)
    compression_type = head[_HEADER_BYTES_MIN[3]] if covered else 0
    # The feature bit and the type say the same thing twice; qemu opens nothing in which they differ.
    if compression_type > 1 or bool(compression_type) != bool(features & _COMPRESSION_TYPE):
        raise _refused(f"qcow2 header claims compression type {compression_type}", _CONVERT)
    return has_subclusters, _ZSTD if compression_type else _DEFLATE


def _check_sizes(header: Header, l1_entries: int) -> None:
    """Refuse a disk of impossible size, or one that its L1 table cannot map."""
    size_bytes = header.virtual_size_bytes
    if size_bytes % SECTOR_BYTES:
        # qemu rounds it down, silently: its users would lack bytes that the header promises.
        raise _refused(f"qcow2 disk of {size_bytes} bytes does not end with a sector", _CONVERT)
    if (
        size_bytes > _VIRTUAL_SIZE_BYTES_MAX
        or l1_entries * L1_ENTRY_BYTES > _L1_BYTES_MAX
        or l1_entries < header.l1_entries
    ):
        reason = f"qcow2 header claims {size_bytes} bytes in an L1 table of {l1_entries} entries"
        raise _refused(reason, _CONVERT)


def _check_places(header: Header, l1_entries: int, refcount_start: int, refcount_clusters: int) -> None:
    """Refuse an L1 table that is not where an L1 table can be."""
    if l1_entries == 0:
        return
    l1_start, l1_stop = header.l1_start, header.l1_start + l1_entries * L1_ENTRY_BYTES
    if l1_start % header.cluster_size_bytes or l1_start < header.cluster_size_bytes:
        raise _refused(f"qcow2 L1 table lies at byte {l1_start}", _CONVERT)
    if l1_stop > header.source_size_bytes:
        raise _refused(f"qcow2 L1 table ends at byte {l1_stop} of {header.source_size_bytes}", _UPLOAD_AGAIN)
    # Refcounts are not needed to read, but one of two tables in one place must be wrong.
    refcount_stop = refcount_start + refcount_clusters * header.cluster_size_bytes
    if refcount_start < l1_stop and l1_start < refcount_stop:
        raise _refused(f"qcow2 L1 table at byte {l1_start} overlaps its refcount table", _REPAIR)
