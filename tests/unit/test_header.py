"""The judge of headers: what qemu-img made, and what nobody should open."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyimg.core.header import HEAD_SIZE_BYTES, Verdict, judge
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageRefused

MIB = 1 << 20
DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))


@pytest.fixture(autouse=True)
def _quiet_inspector(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "oslo_utils")


def record(
    disk_format: str | None, size_bytes: int | None, container_format: str | None = "bare"
) -> ImageRecord:
    return ImageRecord("3f2a", "debian", "active", size_bytes, disk_format, container_format)


def verdict_on(source: bytes, disk_format: str, view: str = "stored") -> Verdict:
    return judge(source[:HEAD_SIZE_BYTES], record(disk_format, len(source)), view)


def qcow2_header(
    *,
    version: int = 3,
    backing_offset: int = 0,
    cluster_bits: int = 16,
    size_bytes: int = MIB,
    crypt: int = 0,
    l1_entries: int = 1,
    l1_offset: int = 3 << 16,
    features: int = 0,
    header_length: int = 104,
) -> bytes:
    """Return a qcow2 of four clusters of 64 KiB whose header is as given and whose tables are empty."""
    v2 = struct.pack(
        ">4sIQIIQIIQQIIQ",
        b"QFI\xfb",
        version,
        backing_offset,
        0,
        cluster_bits,
        size_bytes,
        crypt,
        l1_entries,
        l1_offset,
        1 << 16,
        1,
        0,
        0,
    )
    v3 = struct.pack(">QQQII", features, 0, 0, 4, header_length)
    return (v2 + v3).ljust(4 << 16, b"\0")


def boot_sector(*partitions: bytes) -> bytes:
    """Return a sector that ends as a partition table does, with these entries of 16 bytes."""
    return bytes(446) + b"".join(partitions).ljust(64, b"\0") + b"\x55\xaa"


LINUX_PARTITION = struct.pack("<B3BB3BII", 0x80, 0, 2, 0, 0x83, 0, 0, 0, 2048, 4096)
# "MZ", and no boot flag where an MBR would have one: a bzImage.
BZIMAGE = b"MZ" + b"\xea" * 508 + b"\x55\xaa" + bytes(MIB)
ISO = bytes(32768) + b"\x01CD001\x01" + bytes(33) + struct.pack("<I", 100) + bytes(MIB)
VMDK = b"KDMV" + struct.pack("<IIQQQQ", 1, 3, 2048, 128, 1, 20) + bytes(MIB)


@pytest.mark.parametrize(
    ("source", "disk_format"),
    [
        (b"", "raw"),
        (b"x", "raw"),
        (bytes(2 * MIB), "raw"),
        (boot_sector(LINUX_PARTITION) + bytes(MIB), "raw"),
        (ISO, "iso"),
        (boot_sector(LINUX_PARTITION) + ISO[512:], "iso"),
        (bytes(MIB), "ami"),
        (BZIMAGE, "aki"),
        (b"070701" + bytes(MIB), "ari"),
    ],
)
@pytest.mark.parametrize("view", ["stored", "raw"])
def test_bytes_as_they_are_are_presented_raw(source: bytes, disk_format: str, view: str) -> None:
    """raw, iso, ami, aki and ari are bytes as they are in both views, a kernel's boot sector included."""
    assert verdict_on(source, disk_format, view) == Verdict("raw", len(source))


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "preallocation=metadata",
    ],
)
def test_every_qcow2_of_qemu_img_that_is_safe_is_presented(
    options: str, tmp_path: Path, require: Callable[..., None]
) -> None:
    """What qemu-img makes is shown as qcow2 as stored, as raw in the raw view, with its true sizes."""
    require("qemu-img")
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "40M"], check=True)
    wanted = {"cluster_size=512": 512, "cluster_size=2M": 2 * MIB}.get(options, 65536)
    source = path.read_bytes()
    assert verdict_on(source, "qcow2") == Verdict("qcow2", 40 * MIB, wanted)
    assert verdict_on(source, "qcow2", "raw") == Verdict("raw", 40 * MIB, wanted)


def test_own_qcow2_header_is_valid() -> None:
    """The header the refusals below are made from is itself accepted."""
    assert verdict_on(qcow2_header(), "qcow2") == Verdict("qcow2", MIB, 65536)
    assert verdict_on(qcow2_header(version=2), "qcow2") == Verdict("qcow2", MIB, 65536)


@pytest.mark.parametrize(
    ("source", "stored_reason", "raw_reason"),
    [
        (qcow2_header(version=1), "unknown_features", "version 1"),
        (qcow2_header(version=4), "unknown_features", "version 4"),
        (qcow2_header(backing_offset=200), "backing_file", "backing file"),
        (qcow2_header(features=DATA_FILE), "data_file", "data in another file"),
        (qcow2_header(features=1 << 63), "unknown_features", "features unknown here"),
    ],
)
def test_qcow2_that_needs_more_than_itself_is_refused(
    source: bytes, stored_reason: str, raw_reason: str
) -> None:
    """[I8] Another file or a later format is refused, by the inspector where qemu opens it, by us where we decode."""
    for view, reason in (("stored", stored_reason), ("raw", raw_reason)):
        with pytest.raises(ImageRefused, match=f"image 3f2a: .*{reason}.*; "):
            verdict_on(source, "qcow2", view)


def test_extended_l2_is_decoded_but_not_shown_as_stored() -> None:
    """Nova's inspector knows no extended L2 entries; decoded, nobody but us sees them."""
    source = qcow2_header(features=EXTENDED_L2)
    assert verdict_on(source, "qcow2", "raw").presented_format == "raw"
    with pytest.raises(ImageRefused, match="unknown_features"):
        verdict_on(source, "qcow2", "stored")


@pytest.mark.parametrize("view", ["stored", "raw"])
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (qcow2_header(features=DIRTY), "dirty or corrupt"),
        (qcow2_header(features=CORRUPT), "dirty or corrupt"),
        (qcow2_header(crypt=1), "encrypted"),
        (qcow2_header(crypt=2, version=2), "encrypted"),
        (qcow2_header(cluster_bits=8), "cluster_bits 8"),
        (qcow2_header(cluster_bits=63), "cluster_bits 63"),
        (qcow2_header(size_bytes=1 << 63), "claims 9223372036854775808 bytes"),
        (qcow2_header(size_bytes=1 << 40), "L1 table of 1 entries"),
        (qcow2_header(l1_entries=(1 << 32) - 1), "L1 table of 4294967295 entries"),
        (qcow2_header(l1_offset=0), "L1 table lies at byte 0"),
        (qcow2_header(l1_offset=12345), "L1 table lies at byte 12345"),
        (qcow2_header(l1_offset=4 << 16), "L1 table ends at byte 262152 of 262144"),
        (qcow2_header(header_length=100), "length of 100 bytes"),
        (qcow2_header(header_length=1 << 31), "length of 2147483648 bytes"),
    ],
)
def test_unsafe_qcow2_is_refused(source: bytes, reason: str, view: str) -> None:
    """[I8] A header that would make qemu open, trust or repair what it must not is refused."""
    with pytest.raises(ImageRefused, match=f"image 3f2a: .*{reason}.*; "):
        verdict_on(source, "qcow2", view)


@pytest.mark.parametrize("disk_format", ["raw", "ami", "aki", "ari", "iso"])
@pytest.mark.parametrize(
    ("source", "content"),
    [
        (qcow2_header(), "qcow2"),
        (qcow2_header(backing_offset=200), "qcow2"),
        (VMDK, "vmdk"),
        (b"conectix" + bytes(MIB), "vhd"),
        (b"QED\0" + bytes(MIB), "qed"),
        (b"LUKS\xba\xbe\0\1" + bytes(MIB), "luks"),
        (qcow2_header()[:32768] + ISO[32768:], r"iso\+qcow2"),
    ],
)
def test_mislabelled_image_is_refused(disk_format: str, source: bytes, content: str) -> None:
    """[I8] Bytes a program could take for another format are not shown as raw ones."""
    reason = f"its disk_format is {disk_format}, its content is .*{content}"
    with pytest.raises(ImageRefused, match=reason):
        verdict_on(source, disk_format)


@pytest.mark.parametrize(
    ("source", "disk_format"),
    [
        (bytes(MIB), "qcow2"),
        (b"QFI\xfb", "qcow2"),
        (qcow2_header()[:511], "qcow2"),
        (qcow2_header(backing_offset=104)[:104] + b"/etc/shadow", "raw"),
        (b"conectix", "raw"),
        (bytes(MIB), "iso"),
        (ISO, "raw"),
        (ISO, "qcow2"),
        (BZIMAGE, "raw"),
        (boot_sector() + bytes(MIB), "raw"),
    ],
)
def test_content_that_is_not_what_glance_says_is_refused(source: bytes, disk_format: str) -> None:
    """As in Nova: another format, a header cut short, a partition table that is none."""
    with pytest.raises(ImageRefused, match=r"^image 3f2a: .*; "):
        verdict_on(source, disk_format)


@pytest.mark.parametrize("disk_format", ["vmdk", "vhd", "vhdx", "vdi", "ploop", "qed", "luks", "", "QCOW2"])
def test_other_formats_are_refused(disk_format: str) -> None:
    """A disk_format that cannot be presented is refused with the next step, whatever the content is."""
    with pytest.raises(ImageRefused, match="cannot be presented; convert it to raw or qcow2"):
        verdict_on(bytes(MIB), disk_format)


@pytest.mark.parametrize(("disk_format", "size_bytes"), [(None, 5), ("raw", None), (None, None)])
def test_record_without_facts_is_refused(disk_format: str | None, size_bytes: int | None) -> None:
    """A queued image has no format or size yet."""
    with pytest.raises(ImageRefused, match="wait until its upload is complete"):
        judge(b"", record(disk_format, size_bytes), "stored")


@pytest.mark.parametrize("container_format", ["ovf", "ova", "docker", "compressed", "ami", ""])
def test_wrapped_disks_are_refused(container_format: str) -> None:
    """Only the bytes of the disk itself can be presented."""
    with pytest.raises(ImageRefused, match="container_format"):
        judge(bytes(MIB), record("raw", MIB, container_format), "stored")


@pytest.mark.parametrize("disk_format", ["ami", "aki", "ari"])
def test_ami_containers_match_their_format(disk_format: str) -> None:
    """ami, aki and ari come bare or in the container of the same name, not in each other's."""
    for container_format in ("bare", disk_format, None):
        assert judge(bytes(MIB), record(disk_format, MIB, container_format), "stored")
    other = {"ami": "aki", "aki": "ari", "ari": "ami"}[disk_format]
    with pytest.raises(ImageRefused, match=f"container_format {other}"):
        judge(bytes(MIB), record(disk_format, MIB, other), "stored")


def test_incomplete_head_is_no_verdict() -> None:
    """Less than the first MiB of a longer source cannot be judged: an ISO's signature may be missing."""
    with pytest.raises(ImageRefused, match="only 1000 of its first 1048576 bytes"):
        judge(bytes(1000), record("raw", 2 * MIB), "stored")


def test_longer_head_changes_nothing() -> None:
    """Only the first MiB counts, so that the daemon and the companion agree."""
    source = bytes(HEAD_SIZE_BYTES) + os.urandom(4096)
    assert judge(source, record("raw", len(source)), "stored") == Verdict("raw", len(source))


HEADERS = st.sampled_from([qcow2_header(), BZIMAGE[:65536], ISO[:65536], VMDK[:65536]])


@settings(max_examples=300, deadline=None)
@given(
    source=HEADERS,
    changes=st.lists(st.tuples(st.integers(0, 600), st.binary(min_size=1, max_size=8)), max_size=6),
    stop=st.integers(0, 65536),
    disk_format=st.sampled_from(["raw", "qcow2", "iso", "ami", "aki"]),
)
def test_mutated_headers_are_judged_or_refused(
    source: bytes, changes: list[tuple[int, bytes]], stop: int, disk_format: str
) -> None:
    """Whatever the bytes are, the outcome is a verdict or ImageRefused; qcow2 is never passed on as raw."""
    mutated = bytearray(source)
    for offset, data in changes:
        mutated[offset : offset + len(data)] = data
    head = bytes(mutated[:stop])
    try:
        verdict = judge(head, record(disk_format, len(head)), "stored")
    except ImageRefused:
        return
    assert (verdict.presented_format == "qcow2") == head.startswith(b"QFI\xfb")
