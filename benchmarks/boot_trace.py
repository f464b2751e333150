"""A recorded boot: the reads in their order, and the image they were read from.

Files: `NAME.csv` has a header line `# size=BYTES …` and then `offset,length`, one read a line;
`NAME-extents.csv` has `start,length` of the image's allocated extents, the rest of the image being holes.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

FILL_BYTES = 1 << 20


@dataclass(frozen=True)
class Trace:
    """Reads `(offset, length)` in order, and the allocated extents `(start, length)` of the image."""

    name: str
    image_size_bytes: int
    reads: tuple[tuple[int, int], ...]
    extents: tuple[tuple[int, int], ...]

    @property
    def read_bytes(self) -> int:
        """Bytes of all reads together."""
        return sum(length for _, length in self.reads)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all extents together."""
        return sum(length for _, length in self.extents)

    def touched_bytes(self, unit_bytes: int) -> int:
        """Return the bytes of all aligned units of this size that some read touches."""
        units = set[int]()
        for offset, length in self.reads:
            units.update(range(offset // unit_bytes, -(-(offset + length) // unit_bytes)))
        return len(units) * unit_bytes

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"trace {self.name}: {len(self.reads)} reads, {self.read_bytes / 1e6:.1f} MB, "
            f"{self.touched_bytes(1 << 16) / 1e6:.1f} MB in chunks of 64 KiB; image "
            f"{self.image_size_bytes / (1 << 30):.1f} GiB, {self.allocated_bytes / 1e6:.0f} MB allocated"
        )


def load_trace(path: Path) -> Trace:
    """Return the trace of `path` and of the extents file beside it."""
    text = path.read_text()
    found = re.search(r"size=(\d+)", text.partition("\n")[0])
    if found is None:
        raise SystemExit(f"{path}: the first line does not say size=BYTES; record it again")
    extents = path.with_name(f"{path.stem}-extents.csv")
    return Trace(path.stem, int(found[1]), _pairs(text), _pairs(extents.read_text()))


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    # A file that begins with the names of its columns is as good as one that does not.
    rows = [line.split(",") for line in lines if line[0].isdigit()]
    return tuple((int(row[0]), int(row[1])) for row in rows)


def synthetic_trace() -> Trace:
    """Return an invented boot of the size of the one in the peers' table: about 780 reads, 28 MB, in runs."""
    chance = random.Random(20)
    size_bytes = 4 << 30
    extents = tuple((start, 14 << 20) for start in range(1 << 20, size_bytes - (16 << 20), 128 << 20))
    reads: list[tuple[int, int]] = []
    while len(reads) < 780:
        start, length = chance.choice(extents)
        offset = start + chance.randrange(length // 4096) * 4096
        # A file is read in a few growing steps, as a guest's own read-ahead does it.
        for step_bytes in [4096, 16384, 32768, 65536, 131072][: chance.randint(1, 5)]:
            if offset + step_bytes > start + length:
                break
            reads.append((offset, step_bytes))
            offset += step_bytes
    return Trace("synthetic", size_bytes, tuple(reads), extents)


def make_image(trace: Trace, path: Path, translation: bytes | None = None) -> None:
    """Write a sparse image with pseudo-random bytes, always the same, in the trace's allocated extents.

    translation: 256 bytes, what is written for each of them.
    """
    chance = random.Random(trace.image_size_bytes)
    with path.open("wb") as image:
        image.truncate(trace.image_size_bytes)
        for start, length in trace.extents:
            image.seek(start)
            for done in range(0, length, FILL_BYTES):
                image.write(chance.randbytes(min(FILL_BYTES, length - done)).translate(translation))
