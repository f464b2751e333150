"""Five hundred reads that stall keep nobody else from an answer, and all end with the image's bytes."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from real_mount import Mount, lookup, read_direct, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

CHUNK = 1 << 16
READS = 500
# Not a measurement: far above what a busy machine needs, far below the minutes that the stalled reads wait.
AT_ONCE_S = 5
STALL_S = 600


@contextmanager
def at_once(what: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < AT_ONCE_S, f"{what} waited for reads that stall"


def waiting_requests(mount: Mount) -> int:
    """Return how many requests the kernel has sent and not seen answered, by the daemon's own count."""
    return sum(one.get("waiting_chunks", 0) for one in mount.status()["images"])


def test_stalled_reads_delay_nobody_and_end_right(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I6] With 500 reads of absent chunks waiting, a present read, two lookups and a listing answer at once."""
    glance = make_glance()
    stalled, present = glance.add(READS * CHUNK), glance.add(2 * MIB)
    unseen = glance.add(MIB)
    mount = make_mount(glance, read_timeout=150)
    path = mount.path_of(stalled)
    mount.fetch_all(present)
    path.stat()
    unseen_path = mount.path_of(unseen)
    glance.fail(FaultRule("stall", image_id=stalled.id, seconds=STALL_S))
    # The first MiB is here: its header was judged.
    starts = list(range(MIB, READS * CHUNK, CHUNK))
    starts += [start + 4096 for start in starts[: READS - len(starts)]]
    random.Random(4).shuffle(starts)
    with ThreadPoolExecutor(READS) as pool:
        reads: dict[int, Future[bytes]] = {
            start: pool.submit(read_direct, path, start, 4096) for start in starts
        }
        try:
            wait_until(lambda: waiting_requests(mount) >= len({s // CHUNK for s in starts}), "500 reads", 60)
            with at_once("a present read"):
                assert read_direct(mount.path_of(present), MIB, MIB) == present.content[MIB:]
            with at_once("a lookup of a known name"):
                assert path.stat().st_size == READS * CHUNK
            with at_once("a lookup of a name not seen yet"):
                assert unseen_path.stat().st_size == MIB
            with at_once("a lookup of a name that nobody has"), pytest.raises(FileNotFoundError):
                (mount.path / ("0" * 40)).stat()
            with at_once("a listing"):
                assert present.base_name in os.listdir(mount.path)
            with at_once("status"):
                assert mount.status()["daemon_pid"]
            assert not any(read.done() for read in reads.values())
        finally:
            # The stall ends as an outage ends: connections are dropped, and the next requests are answered.
            glance.stop()
            glance.start()
        for start, read in reads.items():
            assert read.result(120) == stalled.content[start : start + 4096]


def test_lookup_that_cannot_be_decided_ends(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I6] While Glance says nothing a lookup of an unknown name ends with EAGAIN, and later finds it."""
    glance = make_glance()
    known, unknown = glance.add(MIB), glance.add(MIB)
    mount = make_mount(glance, lookup_timeout=1)
    assert mount.path_of(known).read_bytes() == known.content
    glance.fail(FaultRule("delay", kind="any", seconds=STALL_S))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(lookup, mount.path / (digit * 40)) for digit in "abc"]
        waiting.append(pool.submit(lookup, mount.path_of(unknown)))
        with at_once("a lookup of a known name"):
            assert known.base_name in os.listdir(mount.path)
            mount.path_of(known).stat()
        with at_once("lookups that share one limit"):
            assert [one.result(30) for one in waiting] == ["EAGAIN"] * 4
    glance.stop()
    glance.start()
    wait_until(lambda: lookup(mount.path_of(unknown)) == "found", "the name", 30)
    assert mount.path_of(unknown).read_bytes() == unknown.content
