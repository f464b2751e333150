"""The raw view through a real mount: images as qemu-img makes them read as qemu-img reads them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from real_mount import Mount, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage, pattern

from lazyimg.demo.faults import FaultRule
from lazyimg.glance.records import parse_record

pytestmark = pytest.mark.slow

DISK_BYTES = 24 * MIB
CHUNK = 1 << 16


def qemu_img(*words: object) -> str:
    command = ["qemu-img", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def raw_disk(folder: Path) -> Path:
    """Return a raw file of data, zeros, holes and repeats, which qemu-img can convert."""
    path = folder / "disk.raw"
    with path.open("wb") as file:
        file.write(pattern(1, 3 * MIB + 512))
        file.seek(5 * MIB)
        file.write(b"\1" * MIB + bytes(MIB) + pattern(2, MIB))
        file.seek(DISK_BYTES - 4096)
        file.write(pattern(3, 4096))
    return path


def converted(raw: Path, name: str, *options: str) -> Path:
    path = raw.with_name(name)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, raw, path)
    return path


def with_zero_clusters(raw: Path) -> Path:
    """Clusters that read as zeros, allocated and not, over what was data."""
    path = converted(raw, "zeros.qcow2")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -z 0 1M", "-c", "write -z -u 2M 1M", str(path)],
        check=True,
        capture_output=True,
    )
    return path


def with_snapshots(raw: Path) -> Path:
    """Internal snapshots, and what the guest has written since."""
    path = converted(raw, "snapshots.qcow2")
    qemu_img("snapshot", "-c", "one", path)
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write -P 7 512k 3M", str(path)], check=True, capture_output=True
    )
    qemu_img("snapshot", "-c", "two", path)
    return path


def resized(raw: Path) -> Path:
    """Larger than it was, by other than whole clusters."""
    path = converted(raw, "resized.qcow2")
    qemu_img("resize", "-q", path, DISK_BYTES + 3 * MIB + 512)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "version 2": lambda raw: converted(raw, "v2.qcow2", "-o", "compat=0.10"),
    "version 3": lambda raw: converted(raw, "v3.qcow2"),
    "clusters of 512": lambda raw: converted(raw, "c512.qcow2", "-o", "cluster_size=512"),
    "clusters of 4k": lambda raw: converted(raw, "c4k.qcow2", "-o", "compat=0.10,cluster_size=4k"),
    "clusters of 2M": lambda raw: converted(raw, "c2m.qcow2", "-o", "cluster_size=2M"),
    "compressed": lambda raw: converted(raw, "z.qcow2", "-c"),
    "compressed 512": lambda raw: converted(raw, "z512.qcow2", "-c", "-o", "cluster_size=512"),
    "compressed 2M": lambda raw: converted(raw, "z2m.qcow2", "-c", "-o", "cluster_size=2M"),
    "zstd": lambda raw: converted(raw, "zs.qcow2", "-c", "-o", "compression_type=zstd"),
    "zstd 2M": lambda raw: converted(raw, "zs2m.qcow2", "-c", "-o", "compression_type=zstd,cluster_size=2M"),
    "extended_l2": lambda raw: converted(raw, "e.qcow2", "-o", "extended_l2=on"),
    "extended_l2 compressed": lambda raw: converted(raw, "ez.qcow2", "-c", "-o", "extended_l2=on"),
    "preallocated": lambda raw: converted(raw, "p.qcow2", "-o", "preallocation=metadata"),
    "fully preallocated": lambda raw: converted(raw, "pf.qcow2", "-o", "preallocation=full"),
    "zero clusters": with_zero_clusters,
    "snapshots": with_snapshots,
    "resized": resized,
}


def served(glance: ServedGlance, path: Path) -> ServedImage:
    return glance.add(path.read_bytes(), "qcow2")


@pytest.mark.parametrize("kind", KINDS)
def test_reads_as_qemu_reads(
    kind: str, raw_mount: Mount, glance: ServedGlance, tmp_path: Path, require: Callable[..., None]
) -> None:
    """[I1] Size, content and place of data are those that qemu-img finds in the source."""
    require("qemu-img", "qemu-io")
    source = KINDS[kind](raw_disk(tmp_path))
    image = served(glance, source)
    shown = raw_mount.path_of(image)
    assert shown.stat().st_size == json.loads(qemu_img("info", "--output=json", source))["virtual-size"]
    # A corner first, past the page cache, so that chunks come out of order and in part.
    plain = tmp_path / "plain.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", source, plain)
    for start in (shown.stat().st_size // 4096 * 4096 - 8192, 3 * MIB - 8192, 5 * MIB):
        assert read_direct(shown, start, 8192) == read_direct(plain, start, 8192)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", shown, source)
    raw_mount.fetch_all(image)
    key = parse_record(glance.record(image)).key("raw")
    (kept,) = (raw_mount.cache_dir / "chunks").glob(f"{key}.*")
    qemu_img("compare", "-f", "raw", "-F", "qcow2", kept, source)
    chunks = {chunk for start, stop in mapped(plain) for chunk in range(start // CHUNK, -(-stop // CHUNK))}
    assert kept.stat().st_blocks * 512 <= (len(chunks) + 1) * CHUNK, "zeros are holes"


def test_first_mebibyte_is_here_when_the_name_appears(
    raw_mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """Nova's inspection, 256 KiB read twice, costs no request, and all of the first MiB needs no Glance."""
    image = served(glance, converted(raw_disk(tmp_path), "image.qcow2", "-c"))
    shown = raw_mount.path_of(image)
    shown.stat()
    asked = len(glance.data_requests(image))
    for _ in range(2):
        read_direct(shown, 0, 256 << 10)
    assert len(glance.data_requests(image)) == asked
    glance.fail(FaultRule("status", kind="any", status=503))
    assert read_direct(shown, 0, MIB) == pattern(1, MIB)


def test_zero_cluster_costs_no_request(raw_mount: Mount, glance: ServedGlance, tmp_path: Path) -> None:
    """Zero and unallocated clusters are read without Glance being asked for data."""
    image = served(glance, with_zero_clusters(raw_disk(tmp_path)))
    shown = raw_mount.path_of(image)
    shown.stat()
    asked = len(glance.data_requests(image))
    for start in (0, 2 * MIB, 8 * MIB, 16 * MIB):
        assert read_direct(shown, start, MIB) == bytes(MIB)
    assert len(glance.data_requests(image)) == asked


def test_restart_with_glance_down(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance], tmp_path: Path
) -> None:
    """Tables are kept: what is present, and what is zeros, reads after a restart without Glance."""
    glance = make_glance()
    image = served(glance, converted(raw_disk(tmp_path), "image.qcow2", "-c", "-o", "cluster_size=4k"))
    mount = make_mount(glance, view="raw")
    assert read_direct(mount.path_of(image), 5 * MIB, MIB) == b"\1" * MIB
    wait_until(lambda: mount.status_of(image)["present_bytes"] >= 2 * MIB, "chunks on file")
    assert mount.stop() == 0
    glance.stop()
    mount.start()
    shown = mount.path_of(image)
    assert shown.stat().st_size == DISK_BYTES
    assert read_direct(shown, 0, MIB) == pattern(1, MIB)
    assert read_direct(shown, 5 * MIB, MIB) == b"\1" * MIB
    assert read_direct(shown, 4 * MIB, MIB) == bytes(MIB)


def test_readers_of_one_large_cluster_share_one_request(
    raw_mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """[I3] Eight readers of one compressed cluster of 2 MiB cause one request."""
    source = converted(raw_disk(tmp_path), "image.qcow2", "-c", "-o", "cluster_size=2M")
    image = served(glance, source)
    shown = raw_mount.path_of(image)
    shown.stat()
    start = DISK_BYTES - 2 * MIB
    asked = len(glance.data_requests(image))
    glance.fail(FaultRule("delay", seconds=0.5))
    reads = [raw_mount.read_later(image, start + n * CHUNK, CHUNK) for n in range(8)]
    assert b"".join(read.result(60) for read in reads) == bytes(8 * CHUNK)
    assert read_direct(shown, DISK_BYTES - 4096, 4096) == pattern(3, 4096)
    assert len(glance.data_requests(image)) == asked + 1


def test_overlay_over_the_raw_view(
    raw_mount: Mount, glance: ServedGlance, tmp_path: Path, require: Callable[..., None]
) -> None:
    """A guest's disk is an overlay whose backing is raw, and reads what the image holds."""
    require("qemu-img")
    source = converted(raw_disk(tmp_path), "image.qcow2", "-c")
    image = served(glance, source)
    disk = tmp_path / "disk"
    done = lazyimg("overlay", "create", image.id, disk, "--control", raw_mount.control)
    assert done.returncode == 0, done.stderr
    info = json.loads(qemu_img("info", "--output=json", disk))
    assert (info["backing-filename-format"], info["virtual-size"]) == ("raw", DISK_BYTES)
    qemu_img("compare", "-f", "qcow2", "-F", "qcow2", disk, source)


def test_other_formats_are_shown_as_they_are(raw_mount: Mount, glance: ServedGlance) -> None:
    """raw, iso, ami, aki and ari have no other view; their bytes are Glance's."""
    iso = bytearray(pattern(5, MIB))
    iso[:32768] = bytes(32768)
    # ECMA-119 §8.1: the first volume descriptor.
    iso[32768:32775] = b"\1CD001\1"
    for disk_format in ("raw", "iso", "ami", "aki", "ari"):
        content = bytes(iso) if disk_format == "iso" else pattern(6, MIB)
        container = disk_format if disk_format.startswith("a") else "bare"
        image = glance.add(content, disk_format, container_format=container)
        assert raw_mount.path_of(image).read_bytes() == content


def mapped(path: Path) -> list[tuple[int, int]]:
    """Return the ranges of a raw file that are not zeros, in blocks of 4 KiB."""
    data = path.read_bytes()
    zeros = bytes(4096)
    starts = (start for start in range(0, len(data), 4096) if data[start : start + 4096] != zeros)
    return [(start, min(start + 4096, len(data))) for start in starts]
