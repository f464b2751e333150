"""Hostile qcow2: thousands of mutants by the fuzzer, and by hand each lie that a header or table can tell.

More mutants: `python tests/qcow2_fuzz.py --count 100000`.
"""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
from qcow2_fuzz import fuzz
from qcow2_reader import SourceReader
from qcow2_writer import Geometry, Image, write_image

from lazyimg.core.qcow2 import HEADER_BYTES_MAX, Compressed, Data, Zero, parse_header
from lazyimg.errors import ImageRefused, SourceDamaged

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))


@pytest.mark.slow
def test_mutants_are_read_or_refused(tmp_path: Path) -> None:
    """Of 6,000 mutants none raises anything but ImageRefused, and none takes memory or time without bound."""
    seed = random.SystemRandom().randrange(1 << 32)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(6000, seed, 0, tmp_path)
    print(f"seed {seed}: {dict(outcomes)}")
    # Each outcome is common: mutants that are all refused by their headers would prove nothing.
    assert min(outcomes[name] for name in ("read", "damaged", "refused")) > 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 128 << 10


@pytest.mark.slow
def test_mutants_that_qemu_reads_are_read_alike(tmp_path: Path, require: Callable[..., None]) -> None:
    """Of 150 mutants each that qemu-img converts is either refused or has the same bytes here."""
    require("qemu-img")
    seed = random.SystemRandom().randrange(1 << 32)
    outcomes = fuzz(150, seed, 1, tmp_path)
    print(f"seed {seed}: {dict(outcomes)}")
    assert outcomes["qemu: equal"] > 10


# ── headers ──


def image(**geometry: object) -> Image:
    shape = Geometry(**{"cluster_bits": 12, "virtual_size_bytes": 4 * 4096, **geometry})  # type: ignore[arg-type]  # the caller's own fields
    return write_image(shape, {0: "data", 1: "compressed"}, seed=1)


def with_field(source: bytes, start: int, value: int, size: int) -> bytes:
    return source[:start] + value.to_bytes(size, "big") + source[start + size :]


@pytest.mark.parametrize(
    ("start", "size", "value", "reason"),
    [
        (0, 4, 0x51464900, "has no qcow2 header"),
        (4, 4, 1, "version 1"),
        (4, 4, 4, "version 4"),
        (8, 8, 200, "backing file"),
        (20, 4, 8, "cluster_bits 8"),
        (20, 4, 22, "cluster_bits 22"),
        (20, 4, 0xFFFFFFFF, "cluster_bits"),
        (24, 8, 4 * 4096 + 1, "does not end with a sector"),
        (24, 8, 1 << 63, "L1 table of 1 entries"),
        (24, 8, (2 << 20) + 512, "L1 table of 1 entries"),
        (32, 4, 1, "encrypted"),
        (32, 4, 2, "encrypted"),
        (36, 4, 0, "L1 table of 0 entries"),
        (36, 4, (32 << 20) // 8 + 1, "L1 table of 4194305 entries"),
        (36, 4, 0xFFFFFFFF, "L1 table of"),
        (40, 8, 0, "L1 table lies at byte 0"),
        (40, 8, 4096 + 512, "L1 table lies at byte 4608"),
        (40, 8, 4096, "overlaps its refcount table"),
        (40, 8, 1 << 40, "L1 table ends at byte"),
        (40, 8, (1 << 64) - 4096, "L1 table ends at byte"),
        (72, 8, DIRTY, "dirty or corrupt"),
        (72, 8, CORRUPT, "dirty or corrupt"),
        (72, 8, DATA_FILE, "another file"),
        (72, 8, EXTENDED_L2, "extended L2 entries with cluster_bits 12"),
        (72, 8, COMPRESSION, "compression type 0"),
        (72, 8, 1 << 5, "features unknown"),
        (72, 8, 1 << 63, "features unknown"),
        (96, 4, 7, "refcount_order 7"),
        (100, 4, 72, "length of 72"),
        (100, 4, 4097, "length of 4097"),
        (104, 1, 1, "compression type 1"),
        (104, 1, 2, "compression type 2"),
    ],
)
def test_header_is_refused_with_its_reason(start: int, size: int, value: int, reason: str) -> None:
    """Each claim that must not be believed is refused by name, with a next step."""
    source = with_field(image().source, start, value, size)
    with pytest.raises(ImageRefused, match=reason) as caught:
        parse_header(source[:HEADER_BYTES_MAX], len(source))
    assert "; " in str(caught.value)


@pytest.mark.parametrize("length", [0, 3, 71, 72, 103, 104])
def test_short_header_is_refused(length: int) -> None:
    """A source that ends within its header is refused."""
    with pytest.raises(ImageRefused):
        parse_header(image().source[:length], length)


@pytest.mark.parametrize(("start", "size", "value"), [(60, 4, 3), (64, 8, 1 << 50), (80, 8, 1), (88, 8, 3)])
def test_what_reading_does_not_need_is_not_refused(start: int, size: int, value: int) -> None:
    """Snapshots, compatible features and autoclear features leave what the guest sees as it is."""
    one = image()
    changed = with_field(one.source, start, value, size)
    assert SourceReader(changed).read_all() == one.read(0, 4 * 4096)


def test_version_2_has_no_features() -> None:
    """What lies behind a header of version 2 is not taken for fields of version 3."""
    one = image(version=2)
    changed = with_field(one.source, 72, (1 << 64) - 1, 8)
    assert SourceReader(changed).read_all() == one.read(0, 4 * 4096)


# ── tables ──


@pytest.mark.parametrize(
    "entry",
    [
        0x1000 | 1,
        0x1000 | 1 << 8,
        0x4000 | 1 << 56,
        0x4000 | 1 << 62,
        0x4200,
        0x2000,
        1 << 40,
        0x00FF_FFFF_FFFF_F000,
    ],
)
def test_l1_entry_that_cannot_be_is_refused(entry: int) -> None:
    """Reserved bits, a table off its boundary, in the L1 table (a loop), or outside the source."""
    one = image()
    changed = with_field(one.source, one.l1_start, entry, 8)
    with pytest.raises(SourceDamaged, match="L1 table"):
        SourceReader(changed).extents(0, 4096)


BAD_ENTRIES = [0x3000 | 2, 0x3000 | 1 << 8, 0x3000 | 1 << 56, 0x3000 | 1 << 61, 0x3200, 0x2000, 1 << 40]
BAD_COMPRESSED = [1 << 62, 1 << 62 | 0xFFF, 1 << 62 | 0x2000, 1 << 62 | 1 << 50]


@pytest.mark.parametrize("entry", BAD_ENTRIES + BAD_COMPRESSED)
def test_bad_entry_damages_its_cluster_alone(entry: int) -> None:
    """An entry that cannot be takes from the guest the cluster it maps and no other."""
    one = image()
    changed = with_field(one.source, one.table_starts[0] + 16, entry, 8)
    reader = SourceReader(changed)
    with pytest.raises(SourceDamaged, match="entry for the guest's byte 8192"):
        reader.read(8192, 8193)
    assert reader.extents(3 * 4096, 4 * 4096) == [Zero(3 * 4096, 4 * 4096)]


@pytest.mark.parametrize(("sectors", "is_damaged"), [(9, False), (10, True)])
def test_compressed_cluster_may_end_less_than_a_cluster_beyond_the_source(
    sectors: int, is_damaged: bool
) -> None:
    """A last cluster may be there in part, as qemu's checker allows; what is asked for ends with the source."""
    one = image()
    size_bytes = len(one.source)
    start = size_bytes - 1024
    entry = 1 << 62 | (sectors - 1) << 58 | start
    reader = SourceReader(with_field(one.source, one.table_starts[0] + 16, entry, 8))
    if is_damaged:
        with pytest.raises(SourceDamaged, match="points to bytes"):
            reader.extents(8192, 8193)
    else:
        assert reader.extents(8192, 8193) == [Compressed(8192, 3 * 4096, start, size_bytes)]


def test_zero_flag_does_not_exist_in_version_2() -> None:
    """Version 2 has no clusters that read as zeros; qemu calls such an entry corrupt."""
    one = image(version=2)
    reader = SourceReader(with_field(one.source, one.table_starts[0] + 16, 1, 8))
    with pytest.raises(SourceDamaged):
        reader.read(8192, 8193)


@pytest.mark.parametrize(
    ("entry", "bitmap"),
    [
        (0, 1),
        (0, 1 << 32 | 1),
        (0x10000, 1 << 32 | 1),
        (0x10000, 1 << 63 | 1 << 31),
        (0x10001, 0),
        (1 << 62 | 0x10000, 1),
    ],
)
def test_impossible_subclusters_are_damaged(entry: int, bitmap: int) -> None:
    """Subclusters that are allocated and zero, or allocated nowhere, or parts of a compressed cluster."""
    one = image(cluster_bits=14, virtual_size_bytes=4 << 14, has_subclusters=True)
    changed = with_field(one.source, one.table_starts[0] + 32, entry << 64 | bitmap, 16)
    with pytest.raises(SourceDamaged):
        SourceReader(changed).read(2 << 14, 3 << 14)


def test_subclusters_are_extents_of_their_own() -> None:
    """Allocated subclusters are data, others read as zeros, whether they say so or not."""
    one = image(cluster_bits=14, virtual_size_bytes=4 << 14, has_subclusters=True)
    (data, *_) = SourceReader(one.source).extents(0, 1 << 14)
    assert isinstance(data, Data)
    changed = with_field(one.source, one.table_starts[0], data.source_start << 64 | 1 << 33 | 0b1101, 16)
    assert SourceReader(changed).extents(0, 1 << 14) == [
        Data(0, 512, data.source_start),
        Zero(512, 1024),
        Data(1024, 2048, data.source_start + 1024),
        Zero(2048, 1 << 14),
    ]


def test_tables_are_dropped_and_asked_for_again() -> None:
    """However many tables are given, few are kept; a range at the limit finds all of its own."""
    geometry = Geometry(cluster_bits=9, virtual_size_bytes=100 * 64 * 512)
    one = write_image(geometry, {index: "data" for index in range(0, 6400, 32)}, seed=3)
    reader = SourceReader(one.source, tables_bytes_max=8 * 512)
    mapping = reader.mapping
    assert mapping.mappable_bytes_max == 7 * 64 * 512
    for start, stop in reader.windows(mapping.mappable_bytes_max):
        reader.extents(start, stop)
    # Eight tables remain: those of the last two ranges that were asked for.
    assert len(mapping.missing_tables(0, geometry.virtual_size_bytes)) == 92
    assert reader.read_all(mapping.mappable_bytes_max) == one.read(0, geometry.virtual_size_bytes)
