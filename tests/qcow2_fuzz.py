"""Fuzzer of lazyimg.core.qcow2: images whose headers, tables and compressed bytes were changed at random.

Of each mutant: nothing but ImageRefused (SourceDamaged is one) comes out, nothing outside the source is asked
for, no step takes longer than STEP_S_MAX.  Of a sample, what is read is what qemu-img reads, or it was refused.

    python tests/qcow2_fuzz.py --count 100000 --seed 1 --qemu-every 100
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from qcow2_reader import SourceReader
from qcow2_writer import Geometry, Image, write_image

from lazyimg.errors import ImageRefused

# Generous: other programs run beside the fuzzer; what it is to catch is a step without end.
STEP_S_MAX = 10.0
# A mutant may claim a disk of exabytes; some of its ranges are read, where its tables are and elsewhere.
WINDOWS_MAX = 6
WINDOW_BYTES = 128 << 10
# Above this qemu-img is not asked to convert it.
QEMU_SIZE_BYTES_MAX = 64 << 20

# Offset and size of each header field (qcow2 spec, "Header").
HEADER_FIELDS = [
    (0, 4), (4, 4), (8, 8), (16, 4), (20, 4), (24, 8), (32, 4), (36, 4), (40, 8), (48, 8),
    (56, 4), (60, 4), (64, 8), (72, 8), (80, 8), (88, 8), (96, 4), (100, 4), (104, 1),
]  # fmt: skip


def bases() -> list[Image]:
    """Return one small image of each kind, each with every kind of cluster that it can have."""
    geometries = [
        Geometry(2, 9, 100 * 512),
        Geometry(3, 9, 100 * 512, False, "zstd"),
        Geometry(3, 12, 20 * 4096 + 512),
        Geometry(2, 12, 20 * 4096 + 512),
        Geometry(3, 14, 6 * 16384, True),
        Geometry(3, 14, 6 * 16384 + 512, True, "zstd"),
        Geometry(3, 16, 4 * 65536),
    ]
    images = []
    for seed, geometry in enumerate(geometries):
        # Every other cluster or so is left unallocated.
        guest = {
            index: geometry.kinds[index * 2 // 3 % len(geometry.kinds)]
            for index in range(geometry.clusters)
            if index % 3
        }
        images.append(write_image(geometry, guest, seed))
    return images


def mutate(image: Image, chance: random.Random) -> bytes:
    """Return the image's source with one to four changes."""
    source = bytearray(image.source)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 4))):
        kind = chance.choices(("header", "l1", "l2", "compressed", "bytes", "length"), (4, 3, 8, 4, 1, 1))[0]
        if kind == "header":
            start, size = chance.choice(HEADER_FIELDS)
            _change_word(source, start, size, image, chance)
        elif kind == "l1":
            _change_word(source, image.l1_start + 8 * chance.randrange(image.l1_entries), 8, image, chance)
        elif kind == "l2":
            table_start = chance.choice(image.table_starts)
            used_bytes = min(
                image.geometry.clusters * image.geometry.entry_bytes, image.geometry.cluster_bytes
            )
            _change_word(source, table_start + chance.randrange(used_bytes // 8) * 8, 8, image, chance)
        elif kind == "compressed":
            start, stop = chance.choice(image.compressed)
            _put(source, chance.randrange(start, stop), chance.randbytes(chance.choice((1, 1, 4))))
        elif kind == "bytes":
            start = chance.randrange(len(source) or 1)
            _put(source, start, chance.randbytes(chance.choice((1, 8, 600))))
        else:
            del source[chance.randrange(len(source) + 1) :]
    return bytes(source)


def _put(source: bytearray, start: int, data: bytes) -> None:
    """Write within the source's length: it may have been cut."""
    stop = min(start + len(data), len(source))
    source[start:stop] = data[: max(stop - start, 0)]


def _change_word(source: bytearray, start: int, size: int, image: Image, chance: random.Random) -> None:
    """Put a value into a field that is likely to matter: near the old one, a boundary, a place, or any."""
    bits = 8 * size
    old = int.from_bytes(source[start : start + size], "big")
    cluster = image.geometry.cluster_bytes
    value = chance.choice(
        (
            old ^ 1 << chance.randrange(bits),
            old + chance.choice((-cluster, -512, -8, -1, 1, 8, 512, cluster)),
            chance.choice((0, 1, 2, 1 << (bits - 1), (1 << bits) - 1, 1 << (bits // 2))),
            chance.choice((0, 1 << 63)) | chance.randrange(len(image.source) // cluster + 3) * cluster,
            chance.choice((image.l1_start, *image.table_starts, len(image.source))),
            1 << 62 | chance.getrandbits(62),
            chance.getrandbits(bits),
        )
    )
    _put(source, start, (value % (1 << bits)).to_bytes(size, "big"))


def read_hostile(source: bytes, chance: random.Random) -> tuple[SourceReader | None, int]:
    """Read some of a mutant; returns its reader, None if refused, and how many ranges were damaged.

    Raises whatever comes out that is not ImageRefused, and AssertionError for a step that takes too long.
    """
    began = time.monotonic()
    try:
        reader = SourceReader(source, tables_bytes_max=0)
    except ImageRefused:
        return None, 0
    finally:
        _check_time(began)
    damaged = 0
    for start, stop in _windows(reader, chance):
        began = time.monotonic()
        try:
            assert len(reader.read(start, stop)) == stop - start
        except ImageRefused:
            damaged += 1
        _check_time(began)
    return reader, damaged


def _check_time(began: float) -> None:
    assert time.monotonic() - began < STEP_S_MAX, "a step took too long"


def _windows(reader: SourceReader, chance: random.Random) -> list[tuple[int, int]]:
    size_bytes = reader.header.virtual_size_bytes
    if size_bytes <= WINDOWS_MAX * WINDOW_BYTES:
        return list(reader.windows(WINDOW_BYTES))
    starts = [0, size_bytes - WINDOW_BYTES, *(chance.randrange(size_bytes) for _ in range(WINDOWS_MAX - 2))]
    return [(start, min(start + WINDOW_BYTES, size_bytes)) for start in starts]


def compare_with_qemu(source: bytes, folder: Path) -> str:
    """Hold a mutant that qemu-img converts to what qemu-img makes of it; returns what happened.

    Raises AssertionError where we show other bytes than qemu does.
    """
    if len(source) >= 32 and struct.unpack_from(">Q", source, 24)[0] > QEMU_SIZE_BYTES_MAX:
        return "too large for qemu-img here"
    path, raw = folder / "mutant.qcow2", folder / "mutant.raw"
    path.write_bytes(source)
    # Never follow a mutant to another file: a backing file is refused by both, or fails here.
    command = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(path), str(raw)]
    converted = subprocess.run(command, check=False, capture_output=True, timeout=60).returncode == 0
    try:
        reader = SourceReader(source)
        ours = reader.read_all(WINDOW_BYTES)
    except ImageRefused:
        return "refused here, read by qemu" if converted else "refused by both"
    if not converted:
        return "read here, refused by qemu"
    assert ours == raw.read_bytes(), "other bytes than qemu's"
    return "equal"


def fuzz(count: int, seed: int, qemu_every: int, keep: Path) -> Counter[str]:
    """Judge `count` mutants; returns how many ended how.  A mutant that fails is kept in folder `keep`."""
    outcomes: Counter[str] = Counter()
    images = bases()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            # Each mutant is a function of seed and number alone.
            chance = random.Random(f"{seed}/{number}")
            source = mutate(images[number % len(images)], chance)
            try:
                reader, damaged = read_hostile(source, chance)
                outcomes["refused" if reader is None else "damaged" if damaged else "read"] += 1
                if qemu_every and number % qemu_every == 0:
                    outcomes[f"qemu: {compare_with_qemu(source, Path(folder))}"] += 1
            except Exception as exc:
                path = keep / f"mutant-{seed}-{number}.qcow2"
                path.write_bytes(source)
                raise AssertionError(f"seed {seed}, mutant {number}, kept as {path}: {exc!r}") from exc
    return outcomes


def main() -> int:
    """Run from the command line; ends with 1 at the first mutant that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--qemu-every", type=int, default=0, help="compare every Nth with qemu-img; 0: none")
    parser.add_argument("--keep", type=Path, default=Path.cwd(), help="folder for a mutant that fails")
    options = parser.parse_args()
    print(f"seed {options.seed}, {options.count} mutants", flush=True)
    began = time.monotonic()
    try:
        outcomes = fuzz(options.count, options.seed, options.qemu_every, options.keep)
    except AssertionError as exc:
        print(f"FAILED: {exc}", file=sys.stderr)
        return 1
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps(dict(sorted(outcomes.items())), indent=2))
    print(f"{time.monotonic() - began:.0f} s, {peak_mib} MiB at most")
    return 0


if __name__ == "__main__":
    sys.exit(main())
