"""Reading qcow2 as qemu does: images of every kind that qemu-img makes, byte for byte and extent for extent."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from qcow2_reader import SourceReader

from lazyimg.core.qcow2 import Compressed, Data, Zero

KIB, MIB = 1 << 10, 1 << 20

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _qemu(require: Callable[..., None]) -> None:
    require("qemu-img", "qemu-io")


def run(*command: str | Path) -> bytes:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120).stdout


def make(path: Path, size: int | str, options: str) -> Path:
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, str(size))
    return path


def qemu_io(path: Path, *commands: str) -> None:
    run("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)


def write_pattern(path: Path, seed: int, count: int = 40) -> None:
    """Compress clusters, then write, zero and discard at places of all alignments, the same for one seed."""
    chance = random.Random(seed)
    info = json.loads(run("qemu-img", "info", "--output=json", path))
    size_bytes, cluster_bytes = info["virtual-size"], info["cluster-size"]
    # Compressed first: qemu compresses only into clusters that are unallocated.
    clusters = -(-size_bytes // cluster_bytes)
    commands = [
        f"write -c -P {index % 255 + 1} {index * cluster_bytes} "
        f"{min(cluster_bytes, size_bytes - index * cluster_bytes)}"
        for index in {clusters - 1, *chance.sample(range(clusters), min(clusters // 2, 12))}
    ]
    for number in range(count):
        kind = chance.choice(("write", "write", "write -z", "write -zu", "discard"))
        start = chance.randrange(size_bytes // 512) * 512
        length = min(chance.choice((1, 2, 7, 64, 300)) * 512, size_bytes - start)
        pattern = f"-P {number % 255 + 1} " if kind == "write" else ""
        commands.append(f"{kind} {pattern}{start} {length}")
    qemu_io(path, *commands)


def raw_of(path: Path) -> bytes:
    raw = path.with_suffix(".converted")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    content = raw.read_bytes()
    raw.unlink()
    return content


def check_against_qemu(path: Path) -> SourceReader:
    """Hold content and map of an image to qemu's; returns its reader."""
    reader = SourceReader(path.read_bytes())
    expected = raw_of(path)
    for length_bytes in (MIB, 3 * 512 * 11):
        assert reader.read_all(length_bytes) == expected
    assert our_map(reader) == qemu_map(path)
    return reader


Entry = tuple[int, int, str, int | None]


def our_map(reader: SourceReader) -> list[Entry]:
    """Return (start, stop, kind, source_start) of the whole disk, source_start for Data alone."""
    return merged(
        (extent.start, extent.stop, type(extent).__name__, getattr(extent, "source_start", None))
        for extent in reader.all_extents()
    )


def qemu_map(path: Path) -> list[Entry]:
    """Return the same of `qemu-img map`: data that has an offset, zeros, data that has none (compressed)."""
    return merged(
        (
            entry["start"],
            entry["start"] + entry["length"],
            "Zero" if not entry["data"] else "Data" if "offset" in entry else "Compressed",
            entry.get("offset"),
        )
        for entry in json.loads(run("qemu-img", "map", "-f", "qcow2", "--output=json", path))
    )


def merged(entries: Iterable[Entry]) -> list[Entry]:
    """Join neighbours that are one in guest and source; clusters compressed, or zero, are one by kind."""
    found: list[Entry] = []
    for start, stop, kind, place in entries:
        source_start = place if kind == "Data" else None
        if found:
            last_start, _, last_kind, last_source = found[-1]
            follows = None if last_source is None else last_source + start - last_start
            if kind == last_kind and source_start == follows:
                found[-1] = (last_start, stop, kind, last_source)
                continue
        found.append((start, stop, kind, source_start))
    return found


CLUSTER_SIZES = [512 << shift for shift in range(13)]


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_content_and_map_are_qemus(tmp_path: Path, compat: str, cluster_size: int) -> None:
    """Both versions at each cluster size: written, zeroed, discarded and compressed clusters."""
    size_bytes = max(3 * MIB, 20 * cluster_size) + 3 * 512
    path = make(tmp_path / "disk.qcow2", size_bytes, f"compat={compat},cluster_size={cluster_size}")
    write_pattern(path, seed=cluster_size, count=40 if cluster_size <= 64 * KIB else 12)
    reader = check_against_qemu(path)
    assert reader.header.version == (2 if compat == "0.10" else 3)
    assert {type(extent) for extent in reader.all_extents()} == {Data, Zero, Compressed}


@pytest.mark.parametrize("cluster_size", [16 * KIB, 64 * KIB, 128 * KIB, 2 * MIB])
def test_subclusters_are_qemus(tmp_path: Path, cluster_size: int) -> None:
    """Extended L2 entries: parts of a cluster that are written, zeroed or neither."""
    options = f"extended_l2=on,cluster_size={cluster_size}"
    path = make(tmp_path / "disk.qcow2", 5 * cluster_size + 512, options)
    write_pattern(path, seed=cluster_size)
    reader = check_against_qemu(path)
    assert reader.header.has_subclusters
    assert any(
        isinstance(extent, Data) and (extent.stop - extent.start) % cluster_size
        for extent in reader.all_extents()
    )


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4 * KIB, 64 * KIB, 2 * MIB])
def test_compressed_conversion_is_qemus(tmp_path: Path, kind: str, cluster_size: int) -> None:
    """`qemu-img convert -c` of content that compresses well, badly and not at all."""
    chance = random.Random(cluster_size)
    words = [chance.randbytes(9) for _ in range(50)]
    texts = b"".join(chance.choice(words) for _ in range(120_000))
    raw = tmp_path / "disk.raw"
    raw.write_bytes(texts + bytes(MIB) + chance.randbytes(MIB) + texts[: 512 * 77])
    raw.write_bytes(raw.read_bytes()[: raw.stat().st_size // 512 * 512])
    path = tmp_path / "disk.qcow2"
    options = f"compression_type={kind},cluster_size={cluster_size}"
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, path)
    reader = check_against_qemu(path)
    assert reader.header.compression == {"zlib": "deflate", "zstd": "zstd"}[kind]
    assert any(isinstance(extent, Compressed) for extent in reader.all_extents())
    assert reader.read_all() == raw.read_bytes()


@pytest.mark.parametrize("cluster_size", [512, 64 * KIB])
@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocated_image_is_qemus(tmp_path: Path, preallocation: str, cluster_size: int) -> None:
    """Clusters that are allocated ahead read as qemu reads them, written or not."""
    options = f"preallocation={preallocation},cluster_size={cluster_size}"
    path = make(tmp_path / "disk.qcow2", 2 * MIB + 512, options)
    qemu_io(path, "write -P 7 70000 5000", f"write -P 9 {2 * MIB} 512")
    check_against_qemu(path)


@pytest.mark.parametrize("size", ["1K", "64K", "1234567936", "5T"])
def test_empty_disk_is_one_zero_extent(tmp_path: Path, size: str) -> None:
    """A disk that nobody wrote to needs no table but the L1, whatever its size."""
    path = make(tmp_path / "disk.qcow2", size, "")
    reader = SourceReader(path.read_bytes())
    size_bytes = reader.header.virtual_size_bytes
    assert reader.mapping.missing_tables(0, size_bytes) == []
    assert reader.all_extents() == [Zero(0, size_bytes)]


def test_disk_of_no_bytes(tmp_path: Path) -> None:
    """A disk of no bytes has nothing to map."""
    reader = SourceReader(make(tmp_path / "disk.qcow2", 0, "").read_bytes())
    assert reader.all_extents() == []


def test_resized_disk_is_qemus(tmp_path: Path) -> None:
    """A disk that shrank and grew maps what its present size covers."""
    path = make(tmp_path / "disk.qcow2", 3 * MIB, "cluster_size=512")
    write_pattern(path, seed=3)
    run("qemu-img", "resize", "-q", "-f", "qcow2", "--shrink", path, str(MIB + 512))
    check_against_qemu(path)
    run("qemu-img", "resize", "-q", "-f", "qcow2", path, str(5 * MIB))
    check_against_qemu(path)


def test_active_state_is_read_beside_internal_snapshots(tmp_path: Path) -> None:
    """Internal snapshots keep their own state; the guest sees what it wrote since."""
    path = make(tmp_path / "disk.qcow2", 3 * MIB, "")
    qemu_io(path, f"write -P 1 0 {3 * MIB}")
    run("qemu-img", "snapshot", "-c", "before", path)
    qemu_io(path, "write -P 2 65536 65536", "write -z 131072 65536")
    reader = check_against_qemu(path)
    assert reader.read(65536, 131072) == b"\2" * 65536
    run("qemu-img", "snapshot", "-a", "before", path)
    assert check_against_qemu(path).read_all() == b"\1" * (3 * MIB)


def test_tables_far_apart_are_qemus(tmp_path: Path) -> None:
    """A large sparse disk needs the tables of what was written, and no more."""
    path = make(tmp_path / "disk.qcow2", "5T", "")
    places = [0, 512 * MIB - 65536, 512 * MIB, (4 << 40) + 4096]
    qemu_io(path, *(f"write -P {number + 1} {place} 65536" for number, place in enumerate(places)))
    reader = SourceReader(path.read_bytes())
    assert len(reader.mapping.missing_tables(0, reader.header.virtual_size_bytes)) == 3
    for number, place in enumerate(places):
        assert reader.read(place, place + 65536) == bytes([number + 1]) * 65536
    assert our_map(reader) == qemu_map(path)
