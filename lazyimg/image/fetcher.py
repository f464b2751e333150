"""Brings absent chunks of one image: single flight, urgent first, retried until the reader's limit.

A flight belongs to the daemon's nursery, never to the reader that came first, so a cancelled reader harms
nobody.  Bytes go to those who wait for them at once, and to the store behind their back; a store that cannot
take them therefore fails no read.  Guards I3, I4 and I5.
"""

from __future__ import annotations

import logging
import random
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import trio

from lazyimg.core.fetchplan import FetchPlan, Piece, Request
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import (
    GlanceUnavailable,
    ImageForbidden,
    ImageNotFound,
    LazyImgError,
    RangesNotSupported,
    ReadTimeout,
    WholeBody,
)
from lazyimg.image.slots import FlightSlots
from lazyimg.image.view import View
from lazyimg.image.writer import Writer

logger = logging.getLogger(__name__)

SourceKind = Literal["ranges", "location", "stream"]

# First pause after a failed attempt; doubles, half of it by chance, up to `retry_pause_max`.
RETRY_PAUSE_MIN_S = 0.05
# Whole bodies in a row, without one good range, that make an image a stream: never a single lie.
WHOLE_BODIES_MAX = 3
# Failures in a row that an operator should hear of; the others are told at INFO.
FAILURES_TOLD = 3


class Glance(Protocol):
    """What the fetcher needs of Glance: one attempt a call, errors of lazyimg.errors."""

    async def image(self, image_id: str) -> ImageRecord: ...

    def open_range(
        self, image_id: str, start: int, stop: int, *, size_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    def open_stream(
        self, image_id: str, *, size_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...


@dataclass(slots=True)
class _Want:
    """A chunk somebody waits for."""

    is_urgent: bool
    waiters: int = 0
    arrived: trio.Event = field(default_factory=trio.Event)
    data: bytes | None = None
    error: LazyImgError | None = None


@dataclass(frozen=True, slots=True)
class FetchStatistics:
    """Counted since the daemon started."""

    requests: int
    fetched_bytes: int
    retries: int
    waiting_chunks: int
    last_error: str | None


class Fetcher:
    """All that goes between Glance and one image's store."""

    def __init__(
        self,
        image_id: str,
        view: View,
        glance: Glance,
        writer: Writer,
        slots: FlightSlots,
        nursery: trio.Nursery,
        *,
        request_bytes_max: int,
        read_timeout_s: float,
        retry_pause_max_s: float,
    ) -> None:
        self._image_id = image_id
        self._view = view
        self._glance = glance
        self._writer = writer
        self._slots = slots
        self._nursery = nursery
        self._read_timeout_s = read_timeout_s
        self._retry_pause_max_s = retry_pause_max_s
        self._plan = FetchPlan(request_bytes_max)
        self._wants: dict[int, _Want] = {}
        self._flights: set[trio.CancelScope] = set()
        # Scopes of those who wait in `fetch`; a stream that goes on moves their deadlines.
        self._readers: set[trio.CancelScope] = set()
        self.source: SourceKind = "ranges"
        self._whole_bodies = 0
        self._ranges_proven = False
        self._is_streaming = False
        # False while only lookups want bytes: their flights may take the slots kept for them, and their stream ends
        # when it has what they want.  One for a reader goes to the end, since the next would begin at zero again.
        self._has_reader = False
        self._slot_free = trio.Event()
        self._is_paused = False
        self._pause_over = trio.Event()
        self._is_stopped = False
        self._failures = 0
        self._requests = 0
        self._fetched_bytes = 0
        self._retries = 0
        self._last_error: LazyImgError | None = None

    @property
    def is_idle(self) -> bool:
        return not self._flights and not self._wants and self._writer.is_idle

    def statistics(self) -> FetchStatistics:
        """Return a snapshot of the counters."""
        error = None if self._last_error is None else str(self._last_error)
        return FetchStatistics(self._requests, self._fetched_bytes, self._retries, len(self._wants), error)

    async def fetch(
        self,
        chunks: Sequence[int],
        *,
        ahead: Iterable[int] = (),
        urgent: bool = True,
        for_lookup: bool = False,
    ) -> dict[int, bytes]:
        """Return the bytes of absent chunks, waiting for them; want those of `ahead` too, waiting for none.

        Urgent wants wait `read_timeout`, on a stream that long without progress, then raise ReadTimeout; others
        wait as long as it takes.  Raises ImageNotFound or ImageForbidden once Glance's record of the image
        itself says so.  Cancellation leaves the flights as they are.
        """
        got: dict[int, bytes] = {}
        wants: dict[int, _Want] = {}
        for chunk in chunks:
            data = self._writer.unwritten(chunk)
            if data is not None:
                got[chunk] = data
                continue
            want = self._wants.setdefault(chunk, _Want(urgent))
            want.is_urgent |= urgent
            want.waiters += 1
            wants[chunk] = want
        if not wants:
            return got
        self._has_reader |= not for_lookup
        self._plan.want(self._view.pieces(wants), urgent=urgent)
        self._want_ahead(ahead)
        limit_s = self._read_timeout_s if urgent else float("inf")
        scope = trio.CancelScope(deadline=trio.current_time() + limit_s)
        if urgent:
            self._readers.add(scope)
        try:
            self._pump()
            with scope:
                for chunk, want in wants.items():
                    await want.arrived.wait()
                    got[chunk] = _outcome(want)
                return got
        finally:
            self._readers.discard(scope)
            self._leave(wants)
        raise ReadTimeout(
            f"image {self._image_id}: chunk {next(c for c in wants if c not in got)} did not come within "
            f"{self._read_timeout_s:g} s ({self._last_error or 'no answer'}); the next read tries again"
        )

    async def wait_written(self) -> None:
        """Wait until all that has arrived is on file or given up."""
        await self._writer.wait_idle()

    def want_background(self, chunks: Iterable[int]) -> None:
        """Ask for absent chunks that somebody may need soon; nobody waits, and a failure forgets them."""
        self._want_ahead(chunks)
        self._pump()

    def abandon_background(self) -> None:
        """Forget what nobody waits for; flights under way are let arrive, a stream ends when it can."""
        self._has_reader = False
        kept = {chunk for chunk, want in self._wants.items() if not want.is_urgent}
        self._plan.abandon_background()
        self._plan.want(self._view.pieces(kept), urgent=False)

    def stop(self) -> None:
        """End all flights; whoever still waits is told that the image was dropped."""
        self._is_stopped = True
        self._writer.stop()
        for scope in self._flights:
            scope.cancel()
        self._fail_all(GlanceUnavailable(f"image {self._image_id}: dropped from the cache; open it again"))

    # ── what is wanted ──

    def _want_ahead(self, chunks: Iterable[int]) -> None:
        # A stream brings everything in its own order anyway.
        if self.source != "stream":
            absent = (chunk for chunk in chunks if not self._writer.holds(chunk))
            self._plan.want(self._view.pieces(absent), urgent=False)

    def _leave(self, wants: dict[int, _Want]) -> None:
        """Take one waiter off each want; what nobody waits for and no flight brings is no longer wanted."""
        for chunk, want in wants.items():
            want.waiters -= 1
            if not want.waiters and self._wants.get(chunk) is want:
                del self._wants[chunk]
                self._plan.abandon(self._view.pieces((chunk,)))

    def _fail_all(self, error: LazyImgError) -> None:
        for chunk, want in list(self._wants.items()):
            want.error = error
            want.arrived.set()
            del self._wants[chunk]
            self._plan.abandon(self._view.pieces((chunk,)))

    def _pump(self) -> None:
        """Start the flights that may start now.  Synchronous, so that plan and slots agree."""
        if self._is_paused or self._is_stopped:
            return
        if self.source == "stream":
            if self._wants and not self._is_streaming:
                self._is_streaming = True
                self._nursery.start_soon(self._guarded, self._stream)
            return
        for urgent in (True, False):
            while self._plan.has_urgent if urgent else self._plan.has_background:
                if not self._slots.take_nowait(
                    urgent=urgent, when_free=self._pump, for_lookup=not self._has_reader
                ):
                    break
                request = self._plan.next_request(urgent=urgent)
                assert request is not None
                self._nursery.start_soon(self._guarded, self._fly, request)

    async def _guarded(self, flight: object, *args: object) -> None:
        """Run a flight so that no bug in it ends the mount; the pieces it lost are asked for again."""
        scope = trio.CancelScope()
        self._flights.add(scope)
        try:
            with scope:
                await flight(*args)  # type: ignore[operator]
        finally:
            self._flights.discard(scope)

    # ── ranges ──

    async def _fly(self, request: Request) -> None:
        """Send one request and hand its pieces on as they arrive."""
        self._requests += 1
        arrived = 0
        error: LazyImgError | None = None
        try:
            async with self._glance.open_range(
                self._image_id,
                request.start,
                request.stop,
                size_bytes=self._view.source_size_bytes,
            ) as body:
                cutter = _Cutter(request.pieces)
                async for data in body:
                    for piece, whole in cutter.feed(data):
                        # From here the piece is the writer's, also when the write fails or is cancelled.
                        arrived += 1
                        await self._arrived(piece, whole)
            self._ranges_proven = True
            self._whole_bodies = 0
        except LazyImgError as exc:
            error = exc
        except Exception as exc:
            logger.exception("image %s: a flight failed in an unforeseen way", self._image_id)
            error = GlanceUnavailable(f"image {self._image_id}: internal error: {exc!r}; will retry")
        finally:
            lost = request.pieces[arrived:]
            self._plan.failed(lost)
            self._slots.give_back(urgent=request.is_urgent)
        if error is not None:
            # What somebody waits for is wanted again before the next `await`; the rest is dropped.
            self._want_again(lost)
            await self._after_failure(error)
        self._pump()

    async def _arrived(self, piece: Piece, data: bytes) -> None:
        self._failures = 0
        self._fetched_bytes += len(data)
        chunks = self._view.decode(piece, data)
        for chunk, presented in chunks:
            want = self._wants.pop(chunk, None)
            if want is not None:
                want.data = presented
                want.arrived.set()
        await self._writer.put(chunks, when_done=lambda: self._plan.arrived(piece))

    def _want_again(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            wants = [self._wants[c] for c in self._view.chunks(piece) if c in self._wants]
            if wants:
                self._plan.want((piece,), urgent=any(want.is_urgent for want in wants))

    # ── the stream ──

    async def _stream(self) -> None:
        """Read the source from its start, for as long as anybody waits; the rest of it too, if a guest does."""
        try:
            while self._wants and not self._is_stopped:
                try:
                    await self._stream_once()
                except LazyImgError as exc:
                    await self._after_failure(exc)
                except Exception as exc:
                    logger.exception("image %s: a stream failed in an unforeseen way", self._image_id)
                    await self._after_failure(GlanceUnavailable(f"internal error: {exc!r}; will retry"))
                while self._is_paused:
                    await self._pause_over.wait()
        finally:
            self._is_streaming = False

    async def _stream_once(self) -> None:
        while not self._slots.take_nowait(
            urgent=True, when_free=self._slot_free.set, for_lookup=not self._has_reader
        ):
            await self._slot_free.wait()
            self._slot_free = trio.Event()
        try:
            self._requests += 1
            size_bytes = self._view.source_size_bytes
            async with self._glance.open_stream(self._image_id, size_bytes=size_bytes) as body:
                cutter = _Cutter(self._view.stream_pieces())
                async for data in body:
                    for piece, whole in cutter.feed(data):
                        await self._arrived(piece, whole)
                    for reader in self._readers:
                        reader.deadline = trio.current_time() + self._read_timeout_s
                    if not self._wants and not self._has_reader:
                        return
        finally:
            self._slots.give_back(urgent=True)

    # ── failures ──

    async def _after_failure(self, error: LazyImgError) -> None:
        """Decide what a failed attempt means; pauses, but never longer than a waiting guest may be kept."""
        self._last_error = error
        if isinstance(error, RangesNotSupported):
            self._become_stream(error)
            return
        if isinstance(error, WholeBody):
            self._whole_bodies += 1
            if self._whole_bodies >= WHOLE_BODIES_MAX and not self._ranges_proven:
                self._become_stream(error)
                return
        if isinstance(error, ImageNotFound | ImageForbidden) and await self._is_final():
            self._fail_all(error)
            return
        retry_after_s = error.retry_after_s if isinstance(error, GlanceUnavailable) else None
        await self._pause(retry_after_s)

    async def _is_final(self) -> bool:
        """True if Glance's record of the image says that it is gone; bytes alone that are refused are not."""
        try:
            await self._glance.image(self._image_id)
        except (ImageNotFound, ImageForbidden) as exc:
            self._last_error = exc
            return True
        except LazyImgError as exc:
            self._last_error = exc
        return False

    def _become_stream(self, why: LazyImgError) -> None:
        if self.source == "stream":
            return
        logger.info("image %s: reading it as one stream: %s", self._image_id, why)
        self.source = "stream"
        self._plan.abandon_background()
        self._plan.abandon(self._view.pieces(self._wants))

    async def _pause(self, retry_after_s: float | None) -> None:
        """Let no flight of this image start for a while.  One pause at a time, whoever failed first."""
        if self._is_paused:
            return
        self._failures += 1
        self._retries += 1
        pause_s = min(RETRY_PAUSE_MIN_S * 2 ** min(self._failures - 1, 20), self._retry_pause_max_s)
        # Half of it by chance, so that many images and hosts do not come back at the same instant.
        pause_s *= random.uniform(0.5, 1)
        if retry_after_s is not None:
            pause_s = min(max(pause_s, retry_after_s), self._retry_pause_max_s)
        # A flight that a passing fault cost is normal operation; several in a row are not.
        level = logging.WARNING if self._failures == FAILURES_TOLD else logging.INFO
        logger.log(level, "image %s: %s; trying again in %.1f s", self._image_id, self._last_error, pause_s)
        self._is_paused = True
        self._pause_over = trio.Event()
        try:
            await trio.sleep(pause_s)
        finally:
            self._is_paused = False
            self._pause_over.set()


def _outcome(want: _Want) -> bytes:
    if want.error is not None:
        # A fresh one for each reader: a shared exception would collect all their tracebacks.
        raise type(want.error)(str(want.error)) from want.error
    assert want.data is not None
    return want.data


class _Cutter:
    """Cuts a body into the pieces it brings, one after another."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._expected = iter(pieces)
        self._piece = next(self._expected, None)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[Piece, bytes]]:
        """Take more of the body and yield each piece that is complete, with its bytes."""
        self._buffer += data
        while self._piece is not None and len(self._buffer) >= self._piece.stop - self._piece.start:
            piece = self._piece
            size_bytes = piece.stop - piece.start
            whole = bytes(memoryview(self._buffer)[:size_bytes])
            del self._buffer[:size_bytes]
            self._piece = next(self._expected, None)
            yield piece, whole
