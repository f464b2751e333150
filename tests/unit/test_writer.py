"""What arrived on its way to the chunk file."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from image_fakes import FakeSpace
from trio.testing import wait_all_tasks_blocked

from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.slots import ByteBudget
from lazyimg.image.unstored import Unstored
from lazyimg.image.writer import BATCH_BYTES_MAX, Writer

DATA = b"0123456789"


class Sink:
    """A chunk file in memory that writes when it is allowed to, or fails."""

    def __init__(self) -> None:
        self.chunks: dict[int, bytes] = {}
        self.calls: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.may_write = threading.Event()
        self.may_write.set()

    def write(self, first_chunk: int, data: Sequence[bytes]) -> None:
        assert self.may_write.wait(60)
        self.calls.append((first_chunk, len(data)))
        if self.error is not None:
            raise self.error
        self.chunks.update(enumerate(data, first_chunk))


class Rig:
    """A writer with its surroundings; `done` lists the puts that have ended."""

    def __init__(self, nursery: trio.Nursery, budget_bytes: int = 1000) -> None:
        self.sink = Sink()
        self.space = FakeSpace()
        self.budget = ByteBudget(budget_bytes)
        self.disk = DiskHealth(Path("/disk"), lambda: None, timeout_s=10)
        self.unstored = Unstored()
        self.writer = Writer(
            self.sink, self.space, self.disk, self.unstored, self.budget, trio.CapacityLimiter(1), nursery
        )
        self.done: list[str] = []

    async def put(self, name: str, *chunks: int, data: bytes = DATA) -> None:
        await self.writer.put([(chunk, data) for chunk in chunks], when_done=lambda: self.done.append(name))


async def test_chunks_are_served_from_memory_until_they_are_on_file(nursery: trio.Nursery) -> None:
    """[I1] Between arrival and write a chunk is in memory; it leaves that only once it is on file."""
    rig = Rig(nursery)
    rig.sink.may_write.clear()
    await rig.put("a", 3, 4)
    assert (rig.writer.unwritten(3), rig.writer.unwritten(4), rig.writer.unwritten(5)) == (DATA, DATA, None)
    assert rig.writer.holds(3)
    assert not rig.writer.is_idle
    assert rig.done == []
    rig.sink.may_write.set()
    await rig.writer.wait_idle()
    assert rig.sink.chunks == {3: DATA, 4: DATA}
    assert rig.writer.unwritten(3) is None
    assert rig.writer.is_idle
    assert rig.done == ["a"]


async def test_neighbours_are_written_in_one_go(nursery: trio.Nursery) -> None:
    """What queues up while a write is under way goes out in as few calls as its gaps allow."""
    rig = Rig(nursery)
    rig.sink.may_write.clear()
    await rig.put("a", 0)
    await wait_all_tasks_blocked()
    for name, chunk in (("b", 1), ("c", 2), ("d", 7), ("e", 8)):
        await rig.put(name, chunk)
    rig.sink.may_write.set()
    await rig.writer.wait_idle()
    assert rig.sink.calls == [(0, 1), (1, 2), (7, 2)]
    assert rig.done == ["a", "b", "c", "d", "e"]


async def test_batch_has_a_largest_size(nursery: trio.Nursery) -> None:
    """[I5] One call writes no more than a batch, however much has queued up."""
    rig = Rig(nursery, budget_bytes=1 << 30)
    rig.sink.may_write.clear()
    await rig.put("first", 100)
    await wait_all_tasks_blocked()
    for chunk in range(6):
        await rig.put("x", chunk, data=bytes(BATCH_BYTES_MAX // 2))
    rig.sink.may_write.set()
    await rig.writer.wait_idle()
    assert rig.sink.calls == [(100, 1), (0, 2), (2, 2), (4, 2)]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EBADF])
async def test_failed_write_leaves_chunks_absent_and_fails_nobody(
    nursery: trio.Nursery, number: int, expected_warnings: Callable[..., None]
) -> None:
    """A disk that takes nothing costs presence: the putter goes on, and the next write is tried.

    A fault of the disk is the disk's to count; all else, as a full one, is the space's.
    """
    rig = Rig(nursery)
    is_fault = number == errno.EIO
    if is_fault:
        expected_warnings("used on and watched")
    rig.sink.error = OSError(number, "injected")
    await rig.put("a", 1)
    await rig.writer.wait_idle()
    assert rig.space.failures == ([] if is_fault else [rig.sink.error])
    assert rig.disk.statistics().errors == is_fault
    assert rig.sink.chunks == {}
    assert rig.writer.unwritten(1) == DATA
    assert rig.done == ["a"]
    rig.sink.error = None
    await rig.put("b", 1)
    await rig.writer.wait_idle()
    assert rig.sink.chunks == {1: DATA}
    assert rig.space.taken_bytes == 0


async def test_bug_in_a_write_ends_nothing(
    nursery: trio.Nursery, expected_warnings: Callable[..., None]
) -> None:
    """[I6] An unforeseen exception is logged; the nursery lives and the writer goes on."""
    expected_warnings("failed in an unforeseen way")
    rig = Rig(nursery)
    rig.sink.error = RuntimeError("a bug")
    await rig.put("a", 1)
    await rig.writer.wait_idle()
    assert rig.done == ["a"]
    assert rig.space.failures == []
    rig.sink.error = None
    await rig.put("b", 2)
    await rig.writer.wait_idle()
    assert rig.sink.chunks == {2: DATA}


@pytest.mark.parametrize("why", ["full", "read-only", "bypassed"])
async def test_what_cannot_be_stored_stays_in_memory_for_a_while(
    nursery: trio.Nursery, why: str, expected_warnings: Callable[..., None]
) -> None:
    """Where nothing can be written nothing waits: what came is served from memory until the image is dropped."""
    rig = Rig(nursery)
    if why == "full":
        rig.space.has_room = False
    else:
        expected_warnings("cache disk")
        await fail(rig.disk, errno.EROFS if why == "read-only" else errno.EIO)
    await rig.put("a", 1)
    assert rig.done == ["a"]
    assert rig.writer.unwritten(1) == DATA
    assert rig.writer.is_idle
    assert rig.sink.calls == []
    assert rig.space.taken_bytes == 0
    rig.writer.stop()
    assert rig.writer.unwritten(1) is None


async def fail(disk: DiskHealth, number: int) -> None:
    """Have the disk fail until it is not written any more."""

    def failing() -> None:
        raise OSError(number, "injected")

    while disk.may_write:
        with pytest.raises(OSError, match="injected"):
            await disk.write(failing, limiter=trio.CapacityLimiter(1))


async def test_budget_holds_back_who_receives_more(nursery: trio.Nursery) -> None:
    """[I5] No more than the budget is unwritten; the chunk that waits for it can be read meanwhile."""
    rig = Rig(nursery, budget_bytes=15)
    rig.sink.may_write.clear()
    await rig.put("a", 1)
    nursery.start_soon(rig.put, "b", 2)
    await wait_all_tasks_blocked()
    assert rig.writer.unwritten(2) == DATA
    assert rig.done == []
    rig.sink.may_write.set()
    with trio.fail_after(60):
        while rig.done != ["a", "b"]:
            await wait_all_tasks_blocked(0.001)
    assert rig.sink.chunks == {1: DATA, 2: DATA}


async def test_cancelled_put_gives_its_chunk_up(nursery: trio.Nursery) -> None:
    """A put that is cancelled while it waits for the budget ends like any other: told once, chunk absent."""
    rig = Rig(nursery, budget_bytes=15)
    rig.sink.may_write.clear()
    await rig.put("a", 1)
    with trio.CancelScope() as scope:
        scope.cancel()
        await rig.put("b", 2)
    assert scope.cancelled_caught
    assert rig.done == ["b"]
    assert rig.writer.unwritten(2) is None
    assert rig.space.taken_bytes == len(DATA)
    rig.sink.may_write.set()
    await rig.writer.wait_idle()
    assert rig.sink.chunks == {1: DATA}


async def test_stopped_writer_writes_nothing_more(nursery: trio.Nursery) -> None:
    """A dropped image's chunk file is closed: what is queued is given up, and that is no failing disk."""
    rig = Rig(nursery)
    rig.sink.may_write.clear()
    await rig.put("a", 1)
    await wait_all_tasks_blocked()
    await rig.put("b", 5)
    rig.writer.stop()
    rig.sink.error = OSError(errno.EBADF, "closed")
    rig.sink.may_write.set()
    await rig.writer.wait_idle()
    await rig.put("c", 6)
    assert sorted(rig.done) == ["a", "b", "c"]
    assert rig.sink.calls == [(1, 1)]
    assert rig.space.failures == []
    assert rig.space.taken_bytes == 0
