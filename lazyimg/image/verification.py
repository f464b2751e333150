"""Reads what is here of an image and says whether it is what it should be, in steps, through the gate to the disk.

No step outlasts the disk's own limit: one that hangs or fails ends the work, and whoever asked is told so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

import trio

from lazyimg.core.chunks import CHUNK_SIZE_BYTES
from lazyimg.errors import ChunkUnreadable
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.store.chunkfile import READ_BYTES_MAX, ChunkFile

# Read, and hashed, in one go: some 8 ms of SHA-512.
STEP_BYTES = 4 << 20
_CHECKED_CHUNKS = READ_BYTES_MAX // CHUNK_SIZE_BYTES


async def damaged_chunks(
    file: ChunkFile, disk: DiskHealth, limiter: trio.CapacityLimiter, report: Callable[[int, int], None]
) -> list[int]:
    """Check every present chunk; return those that were damaged, all dropped by now.

    Those that the disk cannot read count too, and are given up last: a bad sector is written anew, while a disk that
    fails as a whole may have them all when it is back.  `report` is called with bytes gone through and to go through.
    Raises CacheUnusable where the disk is not normal or does not stay in use, OSError.
    """
    damaged, unreadable = list[int](), list[int]()
    disk.check_normal()
    for first in range(0, file.chunk_count, _CHECKED_CHUNKS):
        chunks = range(first, min(first + _CHECKED_CHUNKS, file.chunk_count))
        try:
            damaged += (await disk.read(file.verify, chunks, limiter=limiter))[1]
        except ChunkUnreadable as exc:
            if not disk.may_read:
                disk.check_normal()
            unreadable += exc.chunks
        except OSError:
            disk.check_normal()
            raise
        report(chunks.stop * CHUNK_SIZE_BYTES, file.chunk_count * CHUNK_SIZE_BYTES)
    if unreadable:
        try:
            await disk.write(file.drop, unreadable, limiter=limiter)
        except OSError:
            disk.check_normal()
            raise
    return damaged + unreadable


async def hash_of(
    algo: str,
    size_bytes: int,
    read: Callable[[int, int], bytes],
    disk: DiskHealth,
    limiter: trio.CapacityLimiter,
    after_step: Callable[[int, int], Awaitable[None]],
) -> str:
    """Return the hex digest by `algo` (hashlib's name) of what `read` returns of a whole image, in threads.

    after_step: awaited with first and last byte of what was hashed.  Raises what `read` does, OSError too where the
    disk is not used or does not answer in time.
    """
    digest = hashlib.new(algo, usedforsecurity=False)

    def step(start: int, stop: int) -> None:
        # Never done twice for one part: who was left alone in its thread ends the work.
        digest.update(read(start, stop))

    for start in range(0, size_bytes, STEP_BYTES):
        stop = min(start + STEP_BYTES, size_bytes)
        await disk.read(step, start, stop, limiter=limiter)
        await after_step(start, stop)
    return digest.hexdigest()
