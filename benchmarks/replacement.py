"""How long does a guest wait when the daemon is killed, and when `lazyimg restart` replaces it?

A reader reads present bytes one after the other, past the page cache.  What is printed is its longest read around
each end of a daemon: from the last answer of the old one to the first of the next.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import glance_nginx
import lazyimg_process
import machine
from glance_nginx import ServedImage, served_image
from lazyimg_process import Mounted

TARGET_S = 1.0
IMAGE_BYTES = 64 << 20
READ_BYTES = 4096
# A daemon serves for a while before it is ended, at a moment that no timer of its own knows.
SERVED_S = (1.0, 2.0)


class Reader:
    """Reads the image all over in a thread of its own, and remembers its longest read."""

    def __init__(self, path: Path) -> None:
        self.longest_s = 0.0
        self.reads = 0
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._is_ended = False
        self._thread = threading.Thread(target=self._read_on)

    def _read_on(self) -> None:
        chance = random.Random(1)
        # O_DIRECT wants memory that is aligned, as a mapping is.
        into = mmap.mmap(-1, READ_BYTES)
        while not self._is_ended:
            began_s = time.monotonic()
            offset = chance.randrange(IMAGE_BYTES // READ_BYTES) * READ_BYTES
            if os.preadv(self._fd, [into], offset) != READ_BYTES:
                raise OSError(f"a short read at {offset}")
            self.longest_s = max(self.longest_s, time.monotonic() - began_s)
            self.reads += 1

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Read in the block."""
        self._thread.start()
        try:
            yield
        finally:
            self._is_ended = True
            self._thread.join()
            os.close(self._fd)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where image and cache lie")
    options = parser.parse_args()
    return machine.run_isolated(lambda work_dir: measure(options, work_dir), options.work_dir)


def measure(options: argparse.Namespace, work_dir: Path) -> int:
    """End daemons in turn in both ways and print what the reader felt; 1 if the target is missed."""
    machine.print_machine(["nginx", "-v"])
    image = make_image(work_dir)
    folder = work_dir / "lazyimg"
    folder.mkdir()
    waits: dict[str, list[float]] = {"kill -9": [], "restart": []}
    with (
        glance_nginx.serve_images([image], work_dir / "server", is_shaped=False) as server,
        lazyimg_process.mount(server.endpoint, folder, may_be_replaced=True) as mounted,
    ):
        mounted.prefetch(image.record)
        reader = Reader(mounted.image_path(image.record))
        with reader.running():
            for _ in range(options.rounds):
                waits["kill -9"].append(longest_read_s(mounted, reader, kill))
                waits["restart"].append(longest_read_s(mounted, reader, restart))
    for way, waits_s in waits.items():
        print(f"{way:8} longest read: median {machine.median(waits_s):.2f} s, worst {max(waits_s):.2f} s")
    is_reached = max(waits["kill -9"]) < TARGET_S
    print(f"{reader.reads} reads, none failed")
    print(f"target: back within {TARGET_S:g} s of a kill: {'reached' if is_reached else 'MISSED'}")
    return 0 if is_reached else 1


def make_image(work_dir: Path) -> ServedImage:
    """Return an image of random bytes."""
    path = work_dir / "image.raw"
    path.write_bytes(random.Random(0).randbytes(IMAGE_BYTES))
    return served_image(path, str(uuid.UUID(int=1, version=4)), "image")


def longest_read_s(mounted: Mounted, reader: Reader, end: Callable[[Mounted, int], None]) -> float:
    """End the daemon once it has served for a while; return the longest read until the next one serves."""
    old_pid = mounted.status()["daemon_pid"]
    time.sleep(random.uniform(*SERVED_S))
    reader.longest_s = 0.0
    end(mounted, old_pid)
    reads = reader.reads
    machine.wait_until(lambda: reader.reads > reads + 1, "a read after the end of a daemon")
    # Read before anything else is done on this machine.
    longest_s = reader.longest_s
    machine.wait_until(lambda: mounted.status()["daemon_pid"] != old_pid, "another daemon")
    return longest_s


def kill(_mounted: Mounted, daemon_pid: int) -> None:
    os.kill(daemon_pid, signal.SIGKILL)


def restart(mounted: Mounted, _daemon_pid: int) -> None:
    machine.run(lazyimg_process.LAZYIMG, "restart", "--control", mounted.control)


if __name__ == "__main__":
    sys.exit(main())
