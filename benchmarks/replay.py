"""Replay a trace's reads one after the other and print seconds, latencies and a checksum as JSON.

Runs under the system's Python, which has Debian's libnbd, and so imports nothing of the project.  One program
for every contender: a file (O_DIRECT where asked) or an NBD server's Unix socket.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
import zlib
from collections.abc import Callable

Read = Callable[[int, int], bytes]


def main() -> None:
    """Usage: replay.py READS.json direct|buffered|nbd PATH."""
    reads_path, kind, path = sys.argv[1:]
    with open(reads_path) as file:
        reads: list[tuple[int, int]] = [(offset, length) for offset, length in json.load(file)]
    # Everything a first read pays for, lookup, open and connect, is inside the clock.
    started_s = time.perf_counter()
    read = connect_nbd(path) if kind == "nbd" else open_file(path, is_direct=kind == "direct")
    latencies_s: list[float] = []
    bodies: list[bytes] = []
    before_s = time.perf_counter()
    for offset, length in reads:
        bodies.append(read(offset, length))
        after_s = time.perf_counter()
        latencies_s.append(after_s - before_s)
        before_s = after_s
    seconds = time.perf_counter() - started_s
    checksum = 0
    for body in bodies:
        checksum = zlib.crc32(body, checksum)
    latencies_s.sort()
    result = {
        "seconds": seconds,
        "checksum": checksum,
        "median_ms": latencies_s[len(latencies_s) // 2] * 1e3,
        "p99_ms": latencies_s[len(latencies_s) * 99 // 100] * 1e3,
    }
    print(json.dumps(result))


def open_file(path: str, *, is_direct: bool) -> Read:
    """Return a reader of a file; O_DIRECT needs aligned memory, which an anonymous mapping is."""
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if is_direct else 0))
    memory = memoryview(mmap.mmap(-1, 4 << 20))

    def read(offset: int, length: int) -> bytes:
        got = os.preadv(fd, [memory[:length]], offset)
        if got != length:
            raise SystemExit(f"{path}: {got} of {length} bytes at {offset}")
        return bytes(memory[:length])

    return read


def connect_nbd(socket_path: str) -> Read:
    """Return a reader of an NBD export on a Unix socket."""
    import nbd  # type: ignore[import-not-found]  # Debian's python3-libnbd; the file mode must not need it.

    connection = nbd.NBD()
    connection.connect_unix(socket_path)

    def read(offset: int, length: int) -> bytes:
        return bytes(connection.pread(length, offset))

    return read


if __name__ == "__main__":
    main()
