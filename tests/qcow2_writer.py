"""A writer of small qcow2 images whose every cluster is where and what a test wants it to be.

It shares no code with lazyimg.core.qcow2: what they agree on is the format.  qemu opens its images read-only.
"""

from __future__ import annotations

import random
import struct
import zlib
from dataclasses import dataclass, field
from typing import Literal

from backports import zstd

Kind = Literal["data", "zero", "zero allocated", "compressed", "subclusters"]


@dataclass
class Geometry:
    """What the header says; `guest` below says what the disk holds."""

    version: int = 3
    cluster_bits: int = 9
    virtual_size_bytes: int = 64 * 512
    has_subclusters: bool = False
    compression: Literal["deflate", "zstd"] = "deflate"

    @property
    def cluster_bytes(self) -> int:
        return 1 << self.cluster_bits

    @property
    def entry_bytes(self) -> int:
        return 16 if self.has_subclusters else 8

    @property
    def entries(self) -> int:
        """Entries in an L2 table."""
        return self.cluster_bytes // self.entry_bytes

    @property
    def clusters(self) -> int:
        return -(-self.virtual_size_bytes // self.cluster_bytes)

    @property
    def kinds(self) -> list[Kind]:
        """What a cluster of such an image can be."""
        if self.has_subclusters:
            return ["data", "subclusters", "compressed"]
        if self.version == 3:
            return ["data", "compressed", "zero", "zero allocated"]
        return ["data", "compressed"]


@dataclass
class Image:
    """A finished source, what it must read as, and where its tables are."""

    geometry: Geometry
    source: bytes
    content: dict[int, bytes]
    l1_start: int
    l1_entries: int
    table_starts: list[int]
    compressed: list[tuple[int, int]] = field(default_factory=list)

    def read(self, start: int, stop: int) -> bytes:
        """Return the guest's bytes `[start, stop)` as they must be."""
        size = self.geometry.cluster_bytes
        nothing = bytes(size)
        first, last = start // size, -(-stop // size)
        joined = b"".join(self.content.get(index, nothing) for index in range(first, last))
        return joined[start - first * size : stop - first * size]


def write_image(geometry: Geometry, guest: dict[int, Kind], seed: int) -> Image:
    """Return an image whose guest clusters are as `guest` says and unallocated elsewhere.

    seed: decides contents, and the order in which clusters and tables lie in the source.
    """
    return _Writer(geometry, guest, random.Random(seed)).write()


class _Writer:
    def __init__(self, geometry: Geometry, guest: dict[int, Kind], chance: random.Random) -> None:
        self.geometry = geometry
        self.guest = guest
        self.chance = chance
        self.image = Image(geometry, b"", {}, 0, 0, [])
        tables = sorted({index // geometry.entries for index in guest})
        self.l1_entries = -(-geometry.virtual_size_bytes // (geometry.entries * geometry.cluster_bytes))
        l1_clusters = -(-self.l1_entries * 8 // geometry.cluster_bytes) or 1
        # Compressed streams are packed into an area of their own; two sectors a cluster always suffice here.
        packed_clusters = 2 * sum(kind == "compressed" for kind in guest.values())
        single = [("table", index) for index in tables] + [
            ("cluster", index) for index, kind in guest.items() if kind not in ("zero", "compressed")
        ]
        chance.shuffle(single)
        # Cluster 0 is the header, cluster 1 a refcount table without blocks.
        self.l1_start = 2 * geometry.cluster_bytes
        first = 2 + l1_clusters + packed_clusters
        self.packed_at = (2 + l1_clusters) * geometry.cluster_bytes
        self.packed_stop = first * geometry.cluster_bytes
        self.place = {name: (first + i) * geometry.cluster_bytes for i, name in enumerate(single)}
        self.source = bytearray((first + len(single)) * geometry.cluster_bytes)

    def write(self) -> Image:
        self._put(0, self._header())
        for index, kind in sorted(self.guest.items()):
            table_start = self.place["table", index // self.geometry.entries]
            entry, bitmap = self._cluster(index, kind)
            at = table_start + index % self.geometry.entries * self.geometry.entry_bytes
            self._put(at, struct.pack(">QQ", entry, bitmap)[: self.geometry.entry_bytes])
        for table in sorted({index // self.geometry.entries for index in self.guest}):
            table_start = self.place["table", table]
            self.image.table_starts.append(table_start)
            self._put(self.l1_start + 8 * table, struct.pack(">Q", table_start | 1 << 63))
        self.image.source = bytes(self.source)
        self.image.l1_start, self.image.l1_entries = self.l1_start, self.l1_entries
        return self.image

    def _put(self, start: int, data: bytes) -> None:
        assert start + len(data) <= len(self.source)
        self.source[start : start + len(data)] = data

    def _header(self) -> bytes:
        geometry = self.geometry
        header = struct.pack(
            ">4sIQIIQIIQQIIQ",
            b"QFI\xfb", geometry.version, 0, 0, geometry.cluster_bits, geometry.virtual_size_bytes, 0,
            self.l1_entries, self.l1_start, geometry.cluster_bytes, 1, 0, 0,
        )  # fmt: skip
        if geometry.version == 3:
            features = (geometry.compression == "zstd") << 3 | geometry.has_subclusters << 4
            header += struct.pack(">QQQIIB7x", features, 0, 0, 4, 112, geometry.compression == "zstd")
        return header

    def _cluster(self, index: int, kind: Kind) -> tuple[int, int]:
        """Write a cluster's content; return the words of its entry."""
        all_allocated = (1 << 32) - 1
        if kind == "zero":
            return 1, 0
        if kind == "compressed":
            return self._compressed(index), 0
        start = self.place["cluster", index]
        data = self.chance.randbytes(self.geometry.cluster_bytes)
        self._put(start, data)
        if kind == "zero allocated":
            return start | 1, 0
        if kind == "data":
            self.image.content[index] = data
            return start | 1 << 63, all_allocated
        allocated = self.chance.getrandbits(32)
        zeros = self.chance.getrandbits(32) & ~allocated
        part = self.geometry.cluster_bytes // 32
        self.image.content[index] = b"".join(
            data[i * part : (i + 1) * part] if allocated >> i & 1 else bytes(part) for i in range(32)
        )
        return start | 1 << 63, zeros << 32 | allocated

    def _compressed(self, index: int) -> int:
        geometry = self.geometry
        word = self.chance.randbytes(geometry.cluster_bytes // 8)
        data = word * 8
        self.image.content[index] = data
        packed = _pack(data, geometry.compression)
        start = self.packed_at
        stop = start + len(packed)
        assert stop <= self.packed_stop
        self._put(start, packed)
        self.packed_at = stop
        self.image.compressed.append((start, stop))
        shift = 62 - (geometry.cluster_bits - 8)
        sectors = (stop - 1) // 512 - start // 512
        return 1 << 62 | sectors << shift | start


def _pack(data: bytes, compression: str) -> bytes:
    if compression == "zstd":
        return zstd.compress(data)
    # The window that the format asks for.
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(data) + packer.flush()
