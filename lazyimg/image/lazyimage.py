"""One image as guests see it: what is present is read from its chunk file, what is absent is fetched.

Guards I1: a read returns exactly the image's bytes or raises; absence and damage lead to a fetch, never to zeros.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import trio

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_range, chunks_of
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import (
    ChunkAbsent,
    ChunkDamaged,
    ChunkUnreadable,
    ImageChanged,
    ImageForbidden,
    ImageNotFound,
    LazyImgError,
)
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.fetcher import Fetcher, FetchStatistics
from lazyimg.image.prefetcher import Prefetcher
from lazyimg.image.source import SourceKind
from lazyimg.image.spool import Spool
from lazyimg.image.verification import damaged_chunks, hash_of
from lazyimg.image.want import Cause
from lazyimg.store.chunkfile import ChunkFile

logger = logging.getLogger(__name__)

# A chunk may be dropped as damaged between its fetch and its read; that it happens again and again to one read
# means that the cache disk cannot be used, and the bytes are served from memory.
READ_ROUNDS_MAX = 3
# Fetched in one go by `prefetch`; as many requests as background work may have out.
PREFETCH_BYTES = 32 << 20
# Looked through at once for what is absent.
PART_CHUNKS = 1024

SourceHash = Literal["match", "mismatch", "unknown"]


@dataclass(frozen=True, slots=True)
class ImageStatistics:
    """A snapshot; bytes are of what is presented, but for fetched_bytes."""

    present_bytes: int
    open_handles: int
    damaged_chunks: int
    fetch: FetchStatistics


class LazyImage:
    """An image that can be read as if it were here."""

    def __init__(
        self,
        record: ImageRecord,
        inode: int,
        file: ChunkFile,
        fetcher: Fetcher,
        prefetcher: Prefetcher,
        disk: DiskHealth,
        read_limiter: trio.CapacityLimiter,
        write_limiter: trio.CapacityLimiter,
        hash_limiter: trio.CapacityLimiter,
        *,
        forget_pages: Callable[[int], None],
        spool: Spool | None = None,
    ) -> None:
        """Wire it up.  forget_pages: has the kernel forget what it keeps of an inode; returns at once."""
        self.record = record
        self.inode = inode
        self.size_bytes = file.size_bytes
        self.fetcher = fetcher
        self.open_handles = 0
        # True once the image was evicted: its descriptor's number may be another file's by now.
        self.is_dropped = False
        # Why no byte of it may be read.
        self.refusal: LazyImgError | None = None
        # When somebody last waited for bytes of it, on trio's clock.
        self.last_wanted_s = trio.current_time()
        self._released = trio.Event()
        # Where `hydrate` goes on looking for what is absent.
        self._hydrated_chunk = 0
        self._file = file
        self._prefetcher = prefetcher
        self._disk = disk
        self._read_limiter = read_limiter
        self._write_limiter = write_limiter
        self._hash_limiter = hash_limiter
        self._forget_pages = forget_pages
        # Of a decoded image; Glance's hash is of the source, not of what is decoded from it.
        self._spool = spool
        # How often chunks were found damaged; what was hashed before is of other bytes.
        self.damage_count = 0

    @property
    def is_decoded(self) -> bool:
        """True if what is presented is not the source's own bytes."""
        return self._spool is not None

    @property
    def source(self) -> SourceKind:
        """Where its bytes come from."""
        return self.fetcher.source if self._spool is None else self._spool.source

    @property
    def streamed_bytes_max(self) -> int:
        """How far any stream of its source has come."""
        return self.fetcher.streamed_bytes_max if self._spool is None else self._spool.filled_bytes_max

    @property
    def is_whole(self) -> bool:
        return self._file.is_whole

    @property
    def is_dirty(self) -> bool:
        """True if chunks were written and are not durable yet."""
        return self._file.written_count > 0

    @property
    def present_bytes(self) -> int:
        return min(self._file.present_count * CHUNK_SIZE_BYTES, self.size_bytes)

    @property
    def missing_bytes(self) -> int:
        return self.size_bytes - self.present_bytes

    @property
    def has_descriptor(self) -> bool:
        return self._file.has_descriptor

    def take_idle_descriptor(self) -> int | None:
        """Return the chunk file's descriptor, to be closed, if it can be spared; see ChunkFile."""
        return self._file.take_idle_descriptor()

    def statistics(self) -> ImageStatistics:
        """Return a snapshot of this image's state and counters."""
        return ImageStatistics(
            self.present_bytes, self.open_handles, self._file.damaged_count, self.fetcher.statistics()
        )

    def waits_for(self, start: int, stop: int) -> Cause | Literal["cache"]:
        """Say what a read of this range that has not returned waits for; what is not being fetched is on the disk."""
        cause = self.fetcher.waits_for(chunks_of(start, min(stop, self.size_bytes))) or "cache"
        return "stream" if cause == "glance" and self.source == "stream" else cause

    def opened(self, count: int = 1) -> None:
        """So many handles were opened."""
        self.open_handles += count
        if self._released.is_set():
            self._released = trio.Event()

    def closed(self, count: int = 1) -> None:
        """So many handles were released; with the last one, nothing more is fetched ahead."""
        self.open_handles = max(0, self.open_handles - count)
        if not self.open_handles:
            self._released.set()
            self.fetcher.abandon_background()

    async def wait_released(self) -> None:
        """Wait until the last handle that is known of is released, or the image dropped."""
        await self._released.wait()

    def drop(self) -> None:
        """End all work on the image before its chunk file is closed; it must not be read any more."""
        self.is_dropped = True
        self._released.set()
        self.fetcher.stop()
        if self._spool is not None:
            self._spool.stop()

    def refuse(self, reason: LazyImgError | None) -> None:
        """Answer every read with this from now on, and have the kernel forget what it was given; None: read again."""
        if reason is not None and self.refusal is None:
            self._forget_pages(self.inode)
        self.refusal = reason

    def read_nowait(self, start: int, size_bytes: int) -> bytes | memoryview | None:
        """Return the bytes if they are present, proven and in the page cache, else None: await `read`.

        They must be used before the next `await`; see ChunkFile.read_nowait.
        """
        stop = min(start + size_bytes, self.size_bytes)
        if start >= stop:
            return b""
        if self.is_dropped or self.refusal is not None:
            return None
        data = self._file.read_nowait(start, stop)
        if data is not None and not self._file.is_whole:
            ahead = self._prefetcher.after_hit(start, stop)
            if ahead:
                self.last_wanted_s = trio.current_time()
                self.fetcher.want_background(ahead)
        return data

    async def read(self, start: int, size_bytes: int, *, for_lookup: bool = False) -> bytes:
        """Return `[start, start + size_bytes)`, less only at the image's end, waiting for what is absent.

        Raises ReadTimeout, ImageNotFound, ImageForbidden, ImageChanged; see Fetcher.fetch; ImageQuarantined.
        """
        self._check_refusal()
        data = await self._read(start, min(start + size_bytes, self.size_bytes), for_lookup=for_lookup)
        # Found out while it was read.
        self._check_refusal()
        return data

    def _check_refusal(self) -> None:
        if self.refusal is not None:
            raise type(self.refusal)(str(self.refusal)) from self.refusal

    async def _read(self, start: int, stop: int, *, for_lookup: bool) -> bytes:
        chunks = chunks_of(start, stop)
        fetched: dict[int, bytes] = {}
        for attempt in range(READ_ROUNDS_MAX + 1):
            # In the last round the disk is not asked any more.
            absent = list(chunks) if attempt == READ_ROUNDS_MAX else await self._absent(chunks)
            missing = [chunk for chunk in absent if chunk not in fetched]
            if missing:
                # Ahead of a guest only where it can be stored.
                is_alone = for_lookup or not self._disk.may_write
                ahead = [] if is_alone else self._prefetcher.after_miss(start, stop)
                # No `await` between `_absent` and here: a chunk that arrives meanwhile would be fetched twice.
                self.last_wanted_s = trio.current_time()
                fetched.update(await self.fetcher.fetch(missing, ahead=ahead, for_lookup=for_lookup))
                self.last_wanted_s = trio.current_time()
            try:
                return await self._assemble(start, stop, fetched)
            except ChunkAbsent:
                continue
            except ChunkDamaged:
                self._damaged()
                continue
            except (OSError, ChunkUnreadable) as exc:
                logger.debug("image %s: the cache disk failed a read: %s", self.record.id, exc)
                unread = [chunk for chunk in chunks if chunk not in fetched]
                fetched.update(await self._fetch_past_disk(unread))
                if isinstance(exc, ChunkUnreadable) and all(chunk in fetched for chunk in unread):
                    await self._give_up(exc.chunks)
        return await self._assemble(start, stop, fetched)

    async def _fetch_past_disk(self, chunks: list[int]) -> dict[int, bytes]:
        """Return chunks that may be here and cannot be read; nothing if the disk comes back before Glance answers."""
        fetched: dict[int, bytes] = {}
        with self._disk.until_back():
            try:
                fetched = await self.fetcher.fetch(chunks)
            except (ImageNotFound, ImageForbidden, ImageChanged):
                if not self._disk.may_read:
                    # Nobody but the disk may have them.
                    await trio.sleep(self.fetcher.read_timeout_s)
                raise
            self._disk.note_bypassed(sum(map(len, fetched.values())))
        return fetched

    async def _give_up(self, chunks: list[int]) -> None:
        """Make chunks absent that the disk failed to read and Glance has: they are written anew.

        Not while the disk as a whole fails: then they may be as good as ever when it is back.
        """
        try:
            await self._disk.write(self._file.drop, chunks, limiter=self._write_limiter)
        except OSError as exc:
            logger.debug("image %s: unreadable chunks are kept: %s", self.record.id, exc)

    async def prefetch(self) -> AsyncGenerator[int, None]:
        """Fetch all that is absent, in the background; yield the bytes of the image gone through so far."""
        for start in range(0, self.size_bytes, PREFETCH_BYTES):
            stop = min(start + PREFETCH_BYTES, self.size_bytes)
            absent = await self._absent(chunks_of(start, stop))
            if absent:
                await self.fetcher.fetch(absent, urgent=False)
                await self.fetcher.wait_written()
            yield stop

    async def hydrate(self, bytes_max: int) -> None:
        """Fetch, in the background, some of what is absent, the part after that of the last call.

        Waits as `Fetcher.fetch` does where nobody is in a hurry, and raises what it does.
        """
        chunks_max = max(1, bytes_max // CHUNK_SIZE_BYTES)
        for chunks in self._parts_from(self._hydrated_chunk):
            absent = (await self._absent(chunks))[:chunks_max]
            if absent:
                self._hydrated_chunk = absent[-1] + 1
                await self.fetcher.fetch(absent, urgent=False, at_pace=True)
                await self.fetcher.wait_written()
                return

    def _parts_from(self, first: int) -> Iterator[range]:
        """Yield all chunks in parts, those from `first` on before the others."""
        for start, stop in ((first, self._file.chunk_count), (0, first)):
            for part in range(start, stop, PART_CHUNKS):
                yield range(part, min(part + PART_CHUNKS, stop))

    async def commit(self) -> None:
        """Make what was written durable.  A failure is logged: those chunks are fetched again."""
        try:
            await self._disk.write(self._file.commit, limiter=self._write_limiter)
        except OSError as exc:
            if self._disk.may_write:
                logger.warning("image %s: the cache disk failed to sync: %s", self.record.id, exc)
            return
        if self._spool is not None and self.is_whole:
            await self._spool.remove()

    async def verify(self, report: Callable[[int, int], None]) -> tuple[int, SourceHash]:
        """Check every present chunk, and the source's hash where all are present and Glance gave one.

        Returns how many chunks were damaged, all dropped by now, and the outcome of the hash.  `report` is called
        with bytes done and to do.  Raises CacheUnusable where the cache's disk is not normal, OSError.
        """

        async def hashed(start: int, stop: int) -> None:
            report(stop, self.size_bytes)

        limiter = self._hash_limiter
        damaged = await damaged_chunks(self._file, self._disk, limiter, report)
        if damaged:
            self._damaged()
        source_hash = None if self.is_decoded else self.record.source_hash
        if source_hash is None or damaged or not self.is_whole:
            return len(damaged), "unknown"
        algo, expected = source_hash
        try:
            digest = await hash_of(algo, self.size_bytes, self.stored, self._disk, limiter, hashed)
        except ChunkAbsent:
            # Dropped since it was checked, by a read that found it damaged.
            return 0, "unknown"
        except ChunkDamaged as exc:
            return len(exc.chunks), "unknown"
        except (ChunkUnreadable, OSError):
            self._disk.check_normal()
            raise
        return 0, "match" if digest == expected else "mismatch"

    def stored(self, start: int, stop: int) -> bytes:
        """Return bytes that are on file, proven (thread).  Raises ChunkAbsent, ChunkDamaged or OSError."""
        try:
            return self._file.read(start, stop)
        except ChunkDamaged:
            trio.from_thread.run_sync(self._damaged)
            raise

    def table(self, start: int, stop: int) -> bytes | None:
        """Return a part of the source that was kept as a table, None if it is not here (thread)."""
        return self._file.table(start, stop)

    def _damaged(self) -> None:
        """Chunks were dropped as damaged; what the kernel keeps of them may have come from the disk as it is now."""
        self.damage_count += 1
        self._forget_pages(self.inode)

    async def _absent(self, chunks: range) -> list[int]:
        """Return what is known to be absent; what is not known on a disk that fails is left to `_assemble`."""
        absent = self._file.absent_nowait(chunks)
        if absent is None:
            try:
                found = await self._disk.read(self._file.absent, chunks, limiter=self._read_limiter)
            except OSError:
                return []
            # Asked again, since some may have arrived meanwhile; not known still means that the index fails.
            absent = self._file.absent_nowait(chunks)
            if absent is None:
                absent = found
        return absent

    async def _assemble(self, start: int, stop: int, fetched: dict[int, bytes]) -> bytes:
        """Join the range from what was fetched and what is on file.

        Raises ChunkAbsent, ChunkDamaged, ChunkUnreadable, OSError.
        """
        parts: list[bytes] = []
        at = start
        while at < stop:
            chunk = at // CHUNK_SIZE_BYTES
            data = fetched.get(chunk)
            chunk_start, chunk_stop = chunk_range(chunk, self.size_bytes)
            if data is not None:
                part_stop = min(chunk_stop, stop)
                parts.append(data[at - chunk_start : part_stop - chunk_start])
            else:
                part_stop = chunk_stop
                while part_stop < stop and part_stop // CHUNK_SIZE_BYTES not in fetched:
                    part_stop += CHUNK_SIZE_BYTES
                part_stop = min(part_stop, stop)
                parts.append(
                    await self._disk.read(self._file.read, at, part_stop, limiter=self._read_limiter)
                )
            at = part_stop
        return parts[0] if len(parts) == 1 else b"".join(parts)
