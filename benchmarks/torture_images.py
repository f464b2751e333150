"""The images of torture.py: content that tells its own offset, as Glance has it and as a guest must see it."""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from pathlib import Path

import machine

from lazyimg.core.identity import ImageRecord
from lazyimg.demo.glance import EmbeddedGlance

MIB = 1 << 20
CLUSTER_BYTES = 64 << 10
RAW_BYTES = 128 * MIB
QCOW2_BYTES = 64 * MIB
STREAM_BYTES = 32 * MIB
# Clusters of the qcow2 image that are written uncompressed over what qemu-img compressed.
OVERWRITTEN_CLUSTERS = 100


@dataclass(frozen=True)
class TorturedImage:
    """An image in Glance, and a local file with the bytes that its readers must get."""

    name: str
    record: ImageRecord
    expected: Path


def make_images(folder: Path, glance: EmbeddedGlance, chance: random.Random) -> list[TorturedImage]:
    """Write three images and tell Glance of them."""
    folder.mkdir()
    raw = _pattern_file(folder / "raw.raw", 1, RAW_BYTES)
    qcow2, decoded = _make_qcow2(folder, chance)
    stream = _pattern_file(folder / "stream.raw", 3, STREAM_BYTES)
    return [
        TorturedImage("raw", glance.add_image(raw, name="raw"), raw),
        TorturedImage("qcow2", glance.add_image(qcow2, name="qcow2", disk_format="qcow2"), decoded),
        TorturedImage("stream", glance.add_image(stream, name="stream", no_ranges="true"), stream),
    ]


def pattern(number: int, start: int, stop: int) -> bytes:
    """Return `[start, stop)`, both multiples of 8, of content whose eight bytes are its number and their index."""
    first = number << 40
    return array("Q", range(first + start // 8, first + stop // 8)).tobytes()


def _pattern_file(path: Path, number: int, size_bytes: int) -> Path:
    with path.open("wb") as file:
        for start in range(0, size_bytes, MIB):
            file.write(pattern(number, start, start + MIB))
    return path


def _make_qcow2(folder: Path, chance: random.Random) -> tuple[Path, Path]:
    """Return a qcow2 with compressed, plain, zero and unallocated clusters in a random order, and its raw twin."""
    source, image, decoded = (folder / name for name in ("source.raw", "image.qcow2", "decoded.raw"))
    with source.open("wb") as file:
        for start in range(0, QCOW2_BYTES, CLUSTER_BYTES):
            kind = chance.randrange(3)
            if kind == 0:
                file.seek(CLUSTER_BYTES, 1)
            elif kind == 1:
                file.write(pattern(2, start, start + CLUSTER_BYTES))
            else:
                # qemu-img leaves uncompressed what compression does not make smaller.
                file.write(chance.randbytes(CLUSTER_BYTES))
        file.truncate(QCOW2_BYTES)
    machine.run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", source, image)
    orders = []
    for cluster in chance.sample(range(QCOW2_BYTES // CLUSTER_BYTES), OVERWRITTEN_CLUSTERS):
        how = "-z" if chance.random() < 0.2 else f"-P {chance.randrange(1, 256)}"
        orders += ["-c", f"write {how} {cluster * CLUSTER_BYTES} {CLUSTER_BYTES}"]
    machine.run("qemu-io", "-f", "qcow2", *orders, image)
    machine.run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, decoded)
    source.unlink()
    return image, decoded
