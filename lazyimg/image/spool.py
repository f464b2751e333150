"""The source of a decoded image whose store serves no ranges: one stream fills a file, and ranges are read from it.

A qcow2's tables may lie at its end, so that it cannot be decoded as it streams by.  Who waits for a part waits until
the stream has come so far; guards I1, in that a byte is read from the file only after it was written there, and I5.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing, asynccontextmanager
from functools import partial

import trio

from lazyimg.core.diskstate import FAULTS
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, LazyImgError, RangesNotSupported, WholeBody
from lazyimg.image.brake import Brake
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.flights import Flights
from lazyimg.image.ladder import Ladder
from lazyimg.image.slots import FlightSlots, Guesses
from lazyimg.image.source import Glance, SourceKind
from lazyimg.image.writer import Space
from lazyimg.store.spoolfile import SpoolFile

logger = logging.getLogger(__name__)

# The stream goes on for so long after the last who waited for a part of it: the next would begin at zero again.
LINGER_S = 30
# Read from the file by one thread call.
READ_BYTES_MAX = 256 << 10
# Flights that may wait for the stream at once; those of one image, and no other's.
SPOOL_FLIGHTS_MAX = 64


class SpoolSlots:
    """An image's flights: among those of all images, until they wait for its spool and not for Glance."""

    def __init__(self, shared: FlightSlots) -> None:
        self._shared = shared
        self._own: FlightSlots | None = None
        # Flights out, urgent and not.
        self._out = {True: 0, False: 0}

    @property
    def is_crowded(self) -> bool:
        """As FlightSlots."""
        return (self._own or self._shared).is_crowded

    @property
    def guesses(self) -> Guesses:
        """Those of all images."""
        return self._shared.guesses

    def take_nowait(self, *, urgent: bool, when_free: Callable[[], None], for_lookup: bool = False) -> bool:
        """As FlightSlots."""
        slots = self._own or self._shared
        is_taken = slots.take_nowait(urgent=urgent, when_free=when_free, for_lookup=for_lookup)
        self._out[urgent] += is_taken
        return is_taken

    def give_back(self, *, urgent: bool) -> None:
        """As FlightSlots."""
        self._out[urgent] -= 1
        (self._own or self._shared).give_back(urgent=urgent)

    def leave(self) -> None:
        """From now on none of this image's flights, those out included, stand in other images' way."""
        if self._own is not None:
            return
        self._own = FlightSlots(SPOOL_FLIGHTS_MAX, SPOOL_FLIGHTS_MAX // 2)
        for urgent, count in self._out.items():
            for _ in range(count):
                self._own.take_nowait(urgent=urgent, when_free=_nothing, for_lookup=True)
                self._shared.give_back(urgent=urgent)


class Spool:
    """Glance for one image: its ranges, or its spool's once it is known that there are none."""

    def __init__(
        self,
        glance: Glance,
        record: ImageRecord,
        open_file: Callable[[], SpoolFile],
        space: Space,
        disk: DiskHealth,
        shared_slots: FlightSlots,
        brake: Brake,
        limiter: trio.CapacityLimiter,
        nursery: trio.Nursery,
    ) -> None:
        """Begin with ranges.  open_file: makes an empty file, in a thread.  limiter: of threads that use it."""
        self._glance = glance
        self._record = record
        self._size_bytes = record.size_bytes or 0
        self._open_file = open_file
        self._space = space
        self._disk = disk
        self._shared_slots = shared_slots
        self.slots = SpoolSlots(shared_slots)
        self._brake = brake
        self._limiter = limiter
        self._nursery = nursery
        self._ladder = Ladder(record.id, glance)
        self._filling = Flights(nursery)
        self._file: SpoolFile | None = None
        # The file's bytes that may be read; of any file so far, since to come as far again is no progress.
        self._filled_bytes = self.filled_bytes_max = 0
        self._waiting_count = 0
        self._needed_until_s = 0.0
        # Set and replaced whenever more has come, or the stream has ended.
        self._changed = trio.Event()
        # What the last stream came to, if it did not come to its end.
        self._failure: LazyImgError | None = None

    @property
    def source(self) -> SourceKind:
        """Where the image's bytes come from."""
        return self._ladder.source

    async def image(self, image_id: str) -> ImageRecord:
        return await self._glance.image(image_id)

    async def wait_recovered(self) -> None:
        await self._glance.wait_recovered()

    def open_stream(
        self, image_id: str, *, size_bytes: int, checksum: str | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._glance.open_stream(image_id, size_bytes=size_bytes, checksum=checksum)

    @asynccontextmanager
    async def open_range(
        self,
        image_id: str,
        start: int,
        stop: int,
        *,
        size_bytes: int,
        checksum: str | None = None,
        is_urgent: bool = False,
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        """As Glance's own; of the spool, b"" says that the stream goes on."""
        async with AsyncExitStack() as stack:
            body = None
            if self.source != "stream":
                asked = self._glance.open_range(
                    image_id, start, stop, size_bytes=size_bytes, checksum=checksum, is_urgent=is_urgent
                )
                try:
                    body = await stack.enter_async_context(asked)
                except (RangesNotSupported, WholeBody) as exc:
                    verdict, _ = await self._ladder.judge(exc)
                    if verdict != "stream":
                        raise
                    self.slots.leave()
            if body is not None:
                yield body
                self._ladder.range_came()
                return
        async with aclosing(self._spooled(start, stop)) as spooled:
            yield spooled

    async def remove(self) -> None:
        """Free its room: all of the image is here, or what is in the file cannot be used."""
        file, self._file, self._filled_bytes = self._file, None, 0
        if file is not None:
            try:
                await self._disk.read(file.close, limiter=self._limiter)
            except OSError as exc:
                # The next file of this image's is made after this one is closed.
                logger.info("image %s: its spool stays for now: %s", self._record.id, exc)

    def stop(self) -> None:
        """The image is dropped."""
        self._filling.stop()
        if self._file is not None:
            self._nursery.start_soon(self.remove)

    async def _spooled(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        at = start
        while at < stop:
            file = self._file
            ready = min(stop, at + READ_BYTES_MAX, self._filled_bytes)
            if file is None or ready <= at:
                if await self._more():
                    yield b""
                continue
            try:
                data = await self._disk.read(file.read, at, ready, limiter=self._limiter)
            except OSError as exc:
                raise await self._failed(exc, file) from exc
            yield data
            at = ready

    async def _more(self) -> bool:
        """Wait until the file may have more; True if it never had so much.  Raises what ended the stream."""
        filled_bytes_max = self.filled_bytes_max
        self._waiting_count += 1
        try:
            if not self._filling:
                self._failure = None
                self._filling.start(self._fill)
            await self._changed.wait()
        finally:
            self._waiting_count -= 1
            self._needed_until_s = trio.current_time() + LINGER_S
        if self._failure is not None:
            raise type(self._failure)(str(self._failure)) from self._failure
        return self.filled_bytes_max > filled_bytes_max

    async def _fill(self) -> None:
        """Stream the source into the file, from where that has come, for as long as anybody needs it."""
        failure: LazyImgError | None = None
        try:
            await self._take_slot()
            with self._brake.stream(partial(self._shared_slots.give_back, urgent=True)):
                await self._stream()
        except LazyImgError as exc:
            failure = exc
        except OSError as exc:
            failure = await self._failed(exc, self._file)
        except Exception as exc:
            logger.exception("image %s: its spool failed in an unforeseen way", self._record.id)
            failure = GlanceUnavailable(f"image {self._record.id}: internal error: {exc!r}; will retry")
        # Synchronous from here to this task's end, which makes room for the next.
        self._failure = failure
        self._tell()

    async def _stream(self) -> None:
        # Not even asked for where it could not be kept.
        self._take_room(min(READ_BYTES_MAX, self._size_bytes))
        self._space.stored(min(READ_BYTES_MAX, self._size_bytes))
        if self._file is None:
            self._file = await self._disk.write(self._open_file, limiter=self._limiter)
            if self._filling.is_stopped:
                self.stop()
        file, at = self._file, 0
        async with self._glance.open_stream(self._record.id, size_bytes=self._size_bytes) as body:
            async for data in body:
                # A stream begins at zero, whatever an earlier one has brought.
                if at + len(data) > self._filled_bytes:
                    await self._keep(file, at, data)
                at += len(data)
                is_needed = self._waiting_count or trio.current_time() <= self._needed_until_s
                if not is_needed or not await self._brake.pay(len(data)):
                    return

    async def _keep(self, file: SpoolFile, at: int, data: bytes) -> None:
        self._take_room(len(data))
        try:
            await self._disk.write(file.append, at, data, limiter=self._limiter)
        finally:
            self._space.stored(len(data))
        if file.size_bytes == self._size_bytes:
            await self._check_hash(file)
        if file is self._file:
            self._filled_bytes = file.size_bytes
            self.filled_bytes_max = max(self.filled_bytes_max, file.size_bytes)
        self._tell()

    async def _check_hash(self, file: SpoolFile) -> None:
        """Give up a source that is not of the hash that Glance states: nobody reads the rest of it."""
        expected = self._record.source_hash
        if expected is not None and file.hexdigest() != expected[1]:
            logger.warning(
                "image %s: what Glance sends of it is not of the hash that it states", self._record.id
            )
            await self.remove()
            raise GlanceUnavailable(
                f"image {self._record.id}: Glance sent bytes that are not of its hash; will retry"
            )

    def _take_room(self, size_bytes: int) -> None:
        if not self._space.may_store(size_bytes):
            raise GlanceUnavailable(
                f"image {self._record.id}: the cache has no room for its source, which must be kept whole to be "
                "decoded; make room"
            )

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _failed(self, error: OSError, file: SpoolFile | None) -> GlanceUnavailable:
        """Return what those who wait are told of an error of the disk."""
        if error.errno in (errno.EIO, errno.EBADMSG):
            # Another file may lie where the disk is good; others may have begun it already.
            if file is self._file:
                await self.remove()
        elif error.errno not in FAULTS and error.errno not in (errno.EROFS, errno.EBADF):
            # What the disk's own state does not cover is taken for want of room.
            self._space.storing_failed(error)
        return GlanceUnavailable(f"image {self._record.id}: its spool: {error.strerror}; will retry")

    async def _take_slot(self) -> None:
        free = trio.Event()
        while not self._shared_slots.take_nowait(urgent=True, when_free=free.set):
            await free.wait()
            free = trio.Event()


def _nothing() -> None:
    """Nobody waits for a slot that is certainly free."""
