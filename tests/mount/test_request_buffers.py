"""The buffers that the kernel copies requests into are in the daemon's memory before it does."""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_mount import Mount, read_direct, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.daemon.handshake import WRITE_BYTES_MAX
from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

READS = 20
READ_BYTES = 4096
# In chunks of their own.
APART_BYTES = MIB // 4
# <linux/fuse.h>: fuse_in_header, up to the sender's pid, and the fuse_read_in behind it, up to its size.
REQUEST = struct.Struct("<IIQQIIII" + "QQI")
FUSE_READ = 15
PAGE = mmap.PAGESIZE
# proc_pid_pagemap(5)
IN_MEMORY = 1 << 63


def writable_ranges(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the memory of a process that has no file and can be written to."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*(\[heap\])?$", line)
        if found is not None:
            yield int(found[1], 16), int(found[2], 16)


def pages_in_memory(pid: int) -> set[int]:
    """Return the addresses of the pages that have been written to."""
    with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
        return {
            start + number * PAGE
            for start, stop in writable_ranges(pid)
            for number, (entry,) in enumerate(
                struct.iter_unpack(
                    "<Q", os.pread(pagemap.fileno(), (stop - start) // PAGE * 8, start // PAGE * 8)
                )
            )
            if entry & IN_MEMORY
        }


def read_requests(pid: int, pages: set[int], senders: set[int]) -> Iterator[int]:
    """Yield where in the daemon's memory the requests of these threads to read begin.

    Looks at pages that are there only: to look at others would bring them.
    """
    needle = struct.pack("<II", 80, FUSE_READ)
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for page in pages:
            data = os.pread(memory.fileno(), 2 * PAGE if page + PAGE in pages else PAGE, page)
            at = data.find(needle)
            while 0 <= at < PAGE and at + REQUEST.size <= len(data):
                *_, sender, _, _, _, size_bytes = REQUEST.unpack_from(data, at)
                if sender in senders and size_bytes == READ_BYTES:
                    yield page + at
                at = data.find(needle, at + 1)


def test_buffers_have_room_in_memory_for_a_write(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] Of many requests in flight, each has a buffer in which the largest write would find its pages.

    A daemon killed while the kernel copies a request fails it with EIO where a page is missing, and no kill in a test
    meets that instant for certain.
    """
    glance = make_glance()
    image = glance.add(8 * MIB)
    mount = make_mount(glance, read_timeout=150)
    path = mount.path_of(image)
    path.stat()
    glance.fail(FaultRule("stall", image_id=image.id, seconds=600))
    with ThreadPoolExecutor(READS) as pool:
        reads = [
            pool.submit(read_direct, path, MIB + number * APART_BYTES, READ_BYTES) for number in range(READS)
        ]
        try:
            pid: int = mount.status()["daemon_pid"]
            threads = {int(name) for name in os.listdir("/proc/self/task")}

            def buffers() -> list[set[int]]:
                """The pages that a write needs, of each request that is in flight."""
                pages = pages_in_memory(pid)
                starts = read_requests(pid, pages, threads)
                return [set(range(at & -PAGE, at + WRITE_BYTES_MAX + PAGE, PAGE)) - pages for at in starts]

            missing = wait_until(lambda: len(found := buffers()) == READS and found, "all requests")
            assert missing == [set()] * READS
        finally:
            glance.fail()
        for number, read in enumerate(reads):
            start = MIB + number * APART_BYTES
            assert read.result(60) == image.content[start : start + READ_BYTES]
