"""Makes images out of their records and chunk files, with all that lies between them and Glance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import trio

from lazyimg.core.chunks import chunk_count
from lazyimg.core.fetchplan import Piece
from lazyimg.core.header import HEAD_SIZE_BYTES, is_decoded
from lazyimg.core.identity import ImageRecord
from lazyimg.core.qcow2 import parse_header
from lazyimg.core.readahead import Readahead
from lazyimg.image.brake import Brake, SlowStreams
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.fetcher import Fetcher
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.pinned import PinnedSource
from lazyimg.image.prefetcher import Prefetcher
from lazyimg.image.rawview import Qcow2View
from lazyimg.image.slots import ByteBudget, FlightSlots
from lazyimg.image.source import Glance
from lazyimg.image.spool import Spool
from lazyimg.image.tablestore import TableFile, TableStore
from lazyimg.image.unstored import Unstored
from lazyimg.image.view import StoredView, View
from lazyimg.image.writer import ChunkSink, Space, Writer
from lazyimg.store.chunkfile import ChunkFile
from lazyimg.store.spoolfile import SpoolFile


@dataclass(frozen=True, slots=True)
class Shared:
    """What all images share: flights, bytes not on disk, the disk, and threads, a limiter for each purpose."""

    slots: FlightSlots
    slow_streams: SlowStreams
    unwritten: ByteBudget
    unstored: Unstored
    disk: DiskHealth
    cache_reads: trio.CapacityLimiter
    cache_writes: trio.CapacityLimiter
    hashing: trio.CapacityLimiter
    decoding: trio.CapacityLimiter


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits of each image's fetching, as config names them."""

    request_bytes_max: int
    random_request_bytes_max: int
    read_timeout_s: float
    retry_pause_max_s: float
    tables_memory_max_bytes: int


class Maker(Protocol):
    """What the catalog needs of it."""

    async def make(self, record: ImageRecord, file: ChunkFile, head: bytes | None) -> LazyImage: ...

    async def read_head(self, record: ImageRecord) -> bytes: ...


class ImageMaker:
    """Makes the images of one view."""

    def __init__(
        self,
        glance: Glance,
        space: Space,
        open_spool: Callable[[str, str | None], SpoolFile],
        shared: Shared,
        nursery: trio.Nursery,
        *,
        view: str,
        limits: FetchLimits,
        forget_pages: Callable[[int], None],
        has_news: Callable[[], None],
    ) -> None:
        """Begin.  forget_pages: as of LazyImage.  has_news: called when Glance's record of an image has changed."""
        self._glance = glance
        self._space = space
        self._open_spool = open_spool
        self._shared = shared
        self._nursery = nursery
        self._view = view
        self._limits = limits
        self._forget_pages = forget_pages
        self._has_news = has_news

    async def make(self, record: ImageRecord, file: ChunkFile, head: bytes | None = None) -> LazyImage:
        """Return the image whose chunks are in `file`.

        head: what `read_head` returned for it, where that is at hand.  Raises what `read_head` does where a decoded
        source's header is not in the cache any more.
        """
        view: View = StoredView(file.size_bytes)
        spool: Spool | None = None
        brake = Brake(self._shared.slow_streams)
        if is_decoded(record, self._view):
            spool = self._spool(record, brake)
            head = await self._kept_head(record, file, head)
            view = Qcow2View(parse_header(head, record.size_bytes or 0), self._limits.tables_memory_max_bytes)
        fetcher = self._fetcher(record, view, file, file, self._space, brake, spool)
        readahead = Readahead(self._limits.random_request_bytes_max, self._limits.request_bytes_max)
        return LazyImage(
            record,
            record.inode(self._view),
            file,
            fetcher,
            Prefetcher(file, readahead),
            self._shared.disk,
            self._shared.cache_reads,
            self._shared.cache_writes,
            self._shared.hashing,
            forget_pages=self._forget_pages,
            spool=spool,
        )

    async def read_head(self, record: ImageRecord) -> bytes:
        """Return the source's first bytes, up to HEAD_SIZE_BYTES, for a lookup.  Raises as `Fetcher.fetch` does."""
        size_bytes = record.size_bytes or 0
        head_bytes = min(size_bytes, HEAD_SIZE_BYTES)
        brake = Brake(self._shared.slow_streams)
        fetcher = self._fetcher(record, StoredView(size_bytes), _Nowhere(), _Nowhere(), _Nowhere(), brake)
        try:
            chunks = await fetcher.fetch(range(chunk_count(head_bytes)), for_lookup=True)
        finally:
            fetcher.stop()
        return b"".join(chunks[chunk] for chunk in sorted(chunks))

    async def _kept_head(self, record: ImageRecord, file: ChunkFile, head: bytes | None) -> bytes:
        """Return the source's first bytes, which are in the cache from then on if its disk allows it."""
        tables = self._tables(record, file)
        whole = Piece(0, min(record.size_bytes or 0, HEAD_SIZE_BYTES))
        if head is None:
            kept = await tables.get([whole])
            if whole in kept:
                return kept[whole]
            head = await self.read_head(record)
        await tables.put(whole, head)
        return head

    def _tables(self, record: ImageRecord, file: TableFile) -> TableStore:
        head_bytes = min(record.size_bytes or 0, HEAD_SIZE_BYTES)
        return TableStore(file, self._shared.disk, self._shared.cache_reads, head_bytes)

    def _pinned(self, record: ImageRecord) -> PinnedSource:
        return PinnedSource(self._glance, record, self._has_news)

    def _spool(self, record: ImageRecord, brake: Brake) -> Spool:
        key = record.key(self._view)
        algo = None if record.source_hash is None else record.source_hash[0]
        shared = self._shared

        def open_spool() -> SpoolFile:
            return self._open_spool(key, algo)

        return Spool(
            self._pinned(record),
            record,
            open_spool,
            self._space,
            shared.disk,
            shared.slots,
            brake,
            shared.cache_writes,
            self._nursery,
        )

    def _fetcher(
        self,
        record: ImageRecord,
        view: View,
        sink: ChunkSink,
        tables: TableFile,
        space: Space,
        brake: Brake,
        spool: Spool | None = None,
    ) -> Fetcher:
        shared = self._shared
        return Fetcher(
            record.id,
            view,
            spool or self._pinned(record),
            Writer(
                sink,
                space,
                shared.disk,
                shared.unstored,
                shared.unwritten,
                shared.cache_writes,
                self._nursery,
            ),
            self._tables(record, tables),
            shared.slots if spool is None else spool.slots,
            brake,
            shared.decoding,
            self._nursery,
            request_bytes_max=self._limits.request_bytes_max,
            read_timeout_s=self._limits.read_timeout_s,
            retry_pause_max_s=self._limits.retry_pause_max_s,
        )


class _Nowhere:
    """Keeps nothing: the head of a source is judged before there is a file for its bytes."""

    def write(self, first_chunk: int, data: object) -> None:
        raise AssertionError("nothing is stored")

    def table(self, start: int, stop: int) -> None:
        return None

    def put_table(self, start: int, data: bytes) -> None:
        raise AssertionError("nothing is stored")

    def may_store(self, size_bytes: int) -> bool:
        return False

    def stored(self, size_bytes: int) -> None:
        raise AssertionError("nothing is stored")

    def storing_failed(self, error: OSError) -> None:
        raise AssertionError("nothing is stored")
