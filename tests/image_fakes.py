"""A Glance in memory that fails by script, and what is above it wired as the daemon does, on a real cache folder.

An image's content is that of `store_images.content`: each eight bytes name the image and their own offset.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import trio
from store_images import content, image_entry
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.identity import ImageRecord
from lazyimg.core.pace import Pace
from lazyimg.core.readahead import Readahead
from lazyimg.errors import GlanceUnavailable, ImageNotFound, RangesNotSupported, SourceDoubted
from lazyimg.image.brake import Brake, SlowStreams
from lazyimg.image.catalog import Catalog
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.fetcher import Fetcher
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.pinned import PinnedSource
from lazyimg.image.prefetcher import Prefetcher
from lazyimg.image.slots import ByteBudget, FlightSlots
from lazyimg.image.states import States
from lazyimg.image.tablestore import TableStore
from lazyimg.image.unstored import Unstored
from lazyimg.image.view import StoredView
from lazyimg.image.writer import Space, Writer
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile
from lazyimg.store.entry import ImageEntry

MIB = 1 << 20
# Uneven, so that pieces of a body never end where chunks do.
BODY_STEP_BYTES = 10_000


@dataclass
class Reply:
    """How one request for bytes is answered: in full unless told otherwise.

    error: raised instead of a body.  length_bytes: sent before `then` is raised.  gate: awaited before the
    reply.  hold_at_bytes, resume: the body stops there until `resume` is set.
    """

    error: Exception | None = None
    length_bytes: int | None = None
    then: Exception = field(default_factory=lambda: GlanceUnavailable("a short body"))
    gate: trio.Event | None = None
    hold_at_bytes: int | None = None
    resume: trio.Event = field(default_factory=trio.Event)


class FakeGlance:
    """Serves records and bytes from memory; notes what it was asked.

    replies: how the next requests for bytes are answered, then `always`.  ranges: those asked, in order.
    image_error, list_error: raised instead of an answer.  image_gate: awaited before each record.
    """

    def __init__(self) -> None:
        self.records: dict[str, ImageRecord] = {}
        self.contents: dict[str, Callable[[int, int], bytes]] = {}
        self.replies: deque[Reply] = deque()
        self.always = Reply()
        self.ranges: list[tuple[int, int]] = []
        self.asked_at: list[float] = []
        self.streams = 0
        self.sent_bytes = 0
        self.image_calls: list[str] = []
        self.list_calls = 0
        self.image_error: Exception | None = None
        self.list_error: Exception | None = None
        # False: as a store that serves no ranges.
        self.has_ranges = True
        self.image_gate: trio.Event | None = None
        self.recovered = trio.Event()
        # Ranges that are out now, and the most that ever were.
        self.out: list[tuple[str, int, int]] = []
        self.out_max = 0
        # Ranges that were asked while another that overlaps was out.
        self.asked_twice: list[tuple[int, int]] = []

    def add(self, number: int, size_bytes: int, **changes: object) -> ImageRecord:
        """Upload the image of this number; `changes` are fields of its record."""
        record = image_entry(number, size_bytes).record
        digest = hashlib.sha512(content(number, 0, size_bytes)).hexdigest()
        record = replace(record, os_hash_algo="sha512", os_hash_value=digest)
        record = replace(record, **changes)  # type: ignore[arg-type]  # any field
        self.records[record.id] = record
        self.contents[record.id] = lambda start, stop: content(number, start, stop)
        return record

    async def image(self, image_id: str) -> ImageRecord:
        self.image_calls.append(image_id)
        await trio.lowlevel.checkpoint()
        if self.image_gate is not None:
            await self.image_gate.wait()
        if self.image_error is not None:
            raise self.image_error
        if image_id not in self.records:
            raise ImageNotFound(f"image {image_id}: Glance has none of that id")
        return self.records[image_id]

    async def wait_recovered(self) -> None:
        await self.recovered.wait()

    async def list_images(self) -> list[ImageRecord]:
        self.list_calls += 1
        await trio.lowlevel.checkpoint()
        if self.list_error is not None:
            raise self.list_error
        return list(self.records.values())

    @asynccontextmanager
    async def open_range(
        self,
        image_id: str,
        start: int,
        stop: int,
        *,
        size_bytes: int,
        checksum: str | None = None,
        is_urgent: bool = True,
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        assert 0 <= start < stop <= size_bytes
        self.ranges.append((start, stop))
        if not self.has_ranges:
            await trio.lowlevel.checkpoint()
            raise RangesNotSupported("its store cannot serve ranges")
        self.asked_at.append(trio.current_time())
        if any(i == image_id and start < b and a < stop for i, a, b in self.out):
            self.asked_twice.append((start, stop))
        self.out.append((image_id, start, stop))
        self.out_max = max(self.out_max, len(self.out))
        try:
            self._check_content(image_id, checksum)
            async with self._reply(image_id, start, stop) as body:
                yield body
        finally:
            self.out.remove((image_id, start, stop))

    @asynccontextmanager
    async def open_stream(
        self, image_id: str, *, size_bytes: int, checksum: str | None = None
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        self.streams += 1
        self.asked_at.append(trio.current_time())
        self._check_content(image_id, checksum)
        async with self._reply(image_id, 0, size_bytes) as body:
            yield body

    def _check_content(self, image_id: str, checksum: str | None) -> None:
        sent = self.records[image_id].checksum if image_id in self.records else None
        if checksum and sent and checksum != sent:
            raise SourceDoubted(f"image {image_id}: sent {sent}, not {checksum}")

    @asynccontextmanager
    async def _reply(self, image_id: str, start: int, stop: int) -> AsyncIterator[AsyncIterator[bytes]]:
        reply = self.replies.popleft() if self.replies else self.always
        await trio.lowlevel.checkpoint()
        if reply.gate is not None:
            await reply.gate.wait()
        if reply.error is not None:
            raise reply.error
        body = self._body(image_id, start, stop, reply)
        try:
            yield body
        finally:
            await body.aclose()  # type: ignore[attr-defined]  # it is a generator

    async def _body(self, image_id: str, start: int, stop: int, reply: Reply) -> AsyncIterator[bytes]:
        data = self.contents[image_id](start, stop)[: reply.length_bytes]
        marks = sorted({*range(0, len(data), BODY_STEP_BYTES), reply.hold_at_bytes or 0, len(data)})
        for at, end in pairwise(marks):
            if reply.hold_at_bytes == at:
                await reply.resume.wait()
            await trio.lowlevel.checkpoint()
            self.sent_bytes += end - at
            yield data[at:end]
        if reply.length_bytes is not None:
            raise reply.then


class FakeSpace:
    """Room in the cache, as a test says."""

    def __init__(self) -> None:
        self.has_room = True
        # Taken and neither stored nor given up.
        self.taken_bytes = 0
        self.failures: list[OSError] = []

    def may_store(self, size_bytes: int) -> bool:
        self.taken_bytes += size_bytes if self.has_room else 0
        return self.has_room

    def stored(self, size_bytes: int) -> None:
        self.taken_bytes -= size_bytes

    def storing_failed(self, error: OSError) -> None:
        self.failures.append(error)


class ImageRig:
    """What the daemon wires around images, on a FakeGlance and a real cache folder."""

    def __init__(
        self,
        cache: CacheDir,
        nursery: trio.Nursery,
        *,
        space: Space | None = None,
        requests_max: int = 4,
        background_requests_max: int = 2,
        request_bytes_max: int = MIB,
        write_buffer_max_bytes: int = 64 * MIB,
        read_timeout_s: float = 300,
        open_files_max: int = 1000,
    ) -> None:
        self.cache = cache
        self.nursery = nursery
        self.glance = FakeGlance()
        self.fake_space = FakeSpace()
        self.space = space or self.fake_space
        self.slots = FlightSlots(requests_max, background_requests_max)
        self.budget = ByteBudget(write_buffer_max_bytes)
        self.request_bytes_max = request_bytes_max
        self.read_timeout_s = read_timeout_s
        self.open_files_max = open_files_max
        self.unstored = Unstored()
        # Not watched: what a thread takes is not measured against the test's clock.
        self.disk = DiskHealth(cache.path, cache.probe, timeout_s=10)
        # Without a rate, until a test says otherwise.
        self.slow_streams = SlowStreams(Pace(0), self.disk)
        self.read_limiter = trio.CapacityLimiter(4)
        self.write_limiter = trio.CapacityLimiter(4)
        self.hash_limiter = trio.CapacityLimiter(1)
        self.decoding = trio.CapacityLimiter(2)
        self.writers: list[Writer] = []
        # Inodes whose pages the kernel was told to forget, and how often there was news of an image.
        self.forgotten: list[int] = []
        self.news_count = 0
        # By image id; the last one opened of each.
        self.files: dict[str, ChunkFile] = {}

    def add(self, number: int, size_bytes: int, **changes: object) -> LazyImage:
        """Upload an image and open it here, nothing of it present."""
        record = self.glance.add(number, size_bytes, **changes)
        self.cache.index.put(replace(image_entry(number, size_bytes), record=record))
        return self.make_image(record, self.cache.open_image(record.key("stored")))

    def open_again(self, image: LazyImage) -> LazyImage:
        """Close an image and open it as the next daemon would: nothing of it is proven."""
        key = image.record.key("stored")
        self.cache.close_image(key)
        return self.make_image(image.record, self.cache.open_image(key))

    @property
    def file(self) -> ChunkFile:
        """The chunk file of the image that was opened last."""
        return next(reversed(self.files.values()))

    async def make(self, record: ImageRecord, file: ChunkFile, head: bytes | None = None) -> LazyImage:
        return self.make_image(record, file)

    async def read_head(self, record: ImageRecord) -> bytes:
        raise AssertionError("only decoded images are judged by their source")

    def make_image(self, record: ImageRecord, file: ChunkFile) -> LazyImage:
        self.files[record.id] = file
        writer = Writer(
            file, self.space, self.disk, self.unstored, self.budget, self.write_limiter, self.nursery
        )
        self.writers.append(writer)
        readahead = Readahead(256 << 10, self.request_bytes_max)
        return LazyImage(
            record,
            record.inode("stored"),
            file,
            self.make_fetcher(record, file, writer),
            Prefetcher(file, readahead),
            self.disk,
            self.read_limiter,
            self.write_limiter,
            self.hash_limiter,
            forget_pages=self.forgotten.append,
        )

    def make_fetcher(self, record: ImageRecord, file: ChunkFile, writer: Writer) -> Fetcher:
        return Fetcher(
            record.id,
            StoredView(file.size_bytes),
            PinnedSource(self.glance, record, self.has_news),
            writer,
            TableStore(file, self.disk, self.read_limiter),
            self.slots,
            Brake(self.slow_streams),
            self.decoding,
            self.nursery,
            request_bytes_max=self.request_bytes_max,
            read_timeout_s=self.read_timeout_s,
            retry_pause_max_s=5,
        )

    def has_news(self) -> None:
        self.news_count += 1

    def catalog(
        self, nursery: trio.Nursery | None = None, *, handles: Mapping[int, int] | None = None
    ) -> Catalog:
        """Return a catalog over the cache folder; several one after the other are daemons that were replaced."""
        return Catalog(
            self.glance,
            self.cache,
            States(self.cache.index, self.disk, self.write_limiter, lambda entries: None),
            self,
            nursery or self.nursery,
            self.disk,
            self.write_limiter,
            view="stored",
            lookup_timeout_s=2,
            negative_ttl_s=2,
            handles=handles,
            open_files_max=self.open_files_max,
        )

    async def settle(self) -> None:
        """Return when every task waits for the clock, for a gate, or for ever: no thread works for any image."""
        await wait_all_tasks_blocked()
        limiters = (self.read_limiter, self.write_limiter, self.hash_limiter, self.decoding)
        while any(limiter.borrowed_tokens for limiter in limiters):
            await wait_all_tasks_blocked(0.001)

    async def pass_time(self, clock: MockClock, seconds: int) -> None:
        """Let the clock go on second by second, and what is due then be done."""
        for _ in range(seconds):
            await self.settle()
            clock.jump(1)
        await self.settle()

    async def wait_written(self) -> None:
        """Wait until all that arrived is on file or given up."""
        for writer in self.writers:
            await writer.wait_idle()


class Reader:
    """A fetch in a task of its own."""

    def __init__(self, nursery: trio.Nursery, fetcher: Fetcher, *chunks: int, urgent: bool = True) -> None:
        self.got: dict[int, bytes] | None = None
        self.error: Exception | None = None
        self.ended_at: float | None = None
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, fetcher, chunks, urgent)

    async def _run(self, fetcher: Fetcher, chunks: Sequence[int], urgent: bool) -> None:
        with self.scope:
            try:
                self.got = await fetcher.fetch(chunks, urgent=urgent)
            except Exception as exc:
                self.error = exc
            self.ended_at = trio.current_time()


async def wait_until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; threads are at work, so that a mock clock cannot say when."""
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110  what a thread has done sets no event
            await trio.sleep(0.001)


def chunk_bytes(number: int, chunks: Sequence[int], size_bytes: int) -> dict[int, bytes]:
    """Return what `Fetcher.fetch` gives for these chunks."""
    return {c: content(number, c << 16, min((c + 1) << 16, size_bytes)) for c in chunks}


def entry_of(catalog: Catalog, image: LazyImage) -> ImageEntry:
    """Return what the index has of an image that it must have."""
    entry = catalog.entry_of(image)
    assert entry is not None
    return entry
