"""Writes what arrived to one image's chunk file, in batches, behind the backs of those who wait for it.

A chunk given to the writer is served from memory until it is on file.  A write that fails leaves its chunks
absent and fails nobody: they are fetched again when somebody needs them.  Where nothing can be written the latest
chunks stay in memory for a while.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

import trio

from lazyimg.core.diskstate import FAULTS
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.slots import ByteBudget
from lazyimg.image.unstored import Unstored

logger = logging.getLogger(__name__)

# Written by one thread call: large enough that the hop to a thread (some 100 µs) does not count.
BATCH_BYTES_MAX = 4 << 20


class ChunkSink(Protocol):
    """What the writer needs of a chunk file."""

    def write(self, first_chunk: int, data: Sequence[bytes]) -> None: ...


class Space(Protocol):
    """Whether there is room in the cache."""

    def may_store(self, size_bytes: int) -> bool: ...

    def stored(self, size_bytes: int) -> None: ...

    def storing_failed(self, error: OSError) -> None: ...


class Writer:
    """The chunks of one image on their way to its chunk file."""

    def __init__(
        self,
        sink: ChunkSink,
        space: Space,
        disk: DiskHealth,
        unstored: Unstored,
        budget: ByteBudget,
        limiter: trio.CapacityLimiter,
        nursery: trio.Nursery,
    ) -> None:
        self._sink = sink
        self._space = space
        self._disk = disk
        self._unstored = unstored
        self._budget = budget
        self._limiter = limiter
        self._nursery = nursery
        self._unwritten: dict[int, bytes] = {}
        self._queue: deque[tuple[list[tuple[int, bytes]], Callable[[], None]]] = deque()
        self._is_writing = False
        self._is_stopped = False
        self._idle = trio.Event()
        self._idle.set()
        # Chunks that could not be stored when they came and are on their way to `put` again; set when there are none.
        self._again: set[int] = set()
        self._none_again = trio.Event()
        self._none_again.set()

    @property
    def is_idle(self) -> bool:
        return not self._is_writing

    def unwritten(self, chunk: int) -> bytes | None:
        """Return a chunk that arrived and is not on file; one that could not be stored when it came is tried again."""
        data = self._unwritten.get(chunk)
        if data is None:
            data = self._unstored.get(self, chunk)
            if data is not None and self._disk.may_write and chunk not in self._again:
                if not self._again:
                    self._none_again = trio.Event()
                self._again.add(chunk)
                self._nursery.start_soon(self._put_again, chunk, data)
        return data

    def holds(self, chunk: int) -> bool:
        return chunk in self._unwritten or self._unstored.get(self, chunk) is not None

    async def put(self, chunks: list[tuple[int, bytes]], *, when_done: Callable[[], None]) -> None:
        """Take chunks over; waits while too much is unwritten.  `when_done` is called once, whatever happens."""
        size_bytes = sum(len(data) for _, data in chunks)
        if self._is_stopped:
            when_done()
            return
        if not self._disk.may_write or not self._space.may_store(size_bytes):
            self._unstored.keep(self, chunks)
            when_done()
            return
        self._unwritten.update(chunks)
        try:
            await self._budget.take(size_bytes)
        except BaseException:
            self._forget(chunks)
            self._space.stored(size_bytes)
            when_done()
            raise
        self._queue.append((chunks, when_done))
        if not self._is_writing:
            self._is_writing = True
            self._idle = trio.Event()
            self._nursery.start_soon(self._write_out)

    async def _put_again(self, chunk: int, data: bytes) -> None:
        try:
            # Others may have come since, for whom it made room.
            if self._unstored.take(self, chunk):
                await self.put([(chunk, data)], when_done=lambda: None)
        finally:
            self._again.discard(chunk)
            if not self._again:
                self._none_again.set()

    def stop(self) -> None:
        """Write nothing more: the image is dropped."""
        self._is_stopped = True
        self._unstored.forget(self)

    async def wait_idle(self) -> None:
        """Wait until all that was put, and what was to be put again, is on file or given up."""
        await self._none_again.wait()
        await self._idle.wait()

    async def _write_out(self) -> None:
        try:
            while self._queue and not self._is_stopped:
                await self._write_batch(self._next_batch())
        finally:
            # Something is left only where the image was dropped, or at shutdown.
            while self._queue:
                self._done([self._queue.popleft()])
            self._is_writing = False
            self._idle.set()

    def _next_batch(self) -> list[tuple[list[tuple[int, bytes]], Callable[[], None]]]:
        """Take what is queued first and all that follows it without a gap, up to a batch's size."""
        batch = [self._queue.popleft()]
        size_bytes = sum(len(data) for _, data in batch[0][0])
        while self._queue and size_bytes < BATCH_BYTES_MAX:
            chunks, _ = self._queue[0]
            if not chunks or not batch[-1][0] or chunks[0][0] != batch[-1][0][-1][0] + 1:
                break
            size_bytes += sum(len(data) for _, data in chunks)
            batch.append(self._queue.popleft())
        return batch

    async def _write_batch(self, batch: list[tuple[list[tuple[int, bytes]], Callable[[], None]]]) -> None:
        chunks = [chunk for item, _ in batch for chunk in item]
        try:
            if chunks:
                data = [data for _, data in chunks]
                await self._disk.write(self._sink.write, chunks[0][0], data, limiter=self._limiter)
        except OSError as exc:
            # Once the image is dropped its file is closed under us: nothing is wrong with the disk.
            if not self._is_stopped:
                self._unstored.keep(self, chunks)
                # What the disk's own state does not cover is taken for want of room.
                if exc.errno not in FAULTS and exc.errno != errno.EROFS:
                    self._space.storing_failed(exc)
        except Exception:
            logger.exception("writing chunks %d… failed in an unforeseen way; they stay absent", chunks[0][0])
        finally:
            self._done(batch)

    def _done(self, batch: list[tuple[list[tuple[int, bytes]], Callable[[], None]]]) -> None:
        for chunks, when_done in batch:
            size_bytes = sum(len(data) for _, data in chunks)
            self._budget.give_back(size_bytes)
            self._space.stored(size_bytes)
            self._forget(chunks)
            when_done()

    def _forget(self, chunks: list[tuple[int, bytes]]) -> None:
        for chunk, _ in chunks:
            self._unwritten.pop(chunk, None)
