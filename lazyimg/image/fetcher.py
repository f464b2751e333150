"""Brings absent chunks of one image: single flight, urgent first, retried until the reader's limit.

A flight belongs to the daemon's nursery, never to the reader that came first, so a cancelled reader harms
nobody.  Bytes go to those who wait for them at once, and to the store behind their back; a store that cannot
take them therefore fails no read.  Guards I3, I4 and I5.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

import trio

from lazyimg.core.fetchplan import FetchPlan, Piece, Request
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
from lazyimg.image.source import Cutter, Glance, SourceKind
from lazyimg.image.view import View
from lazyimg.image.want import Want
from lazyimg.image.writer import Writer

logger = logging.getLogger(__name__)

# First pause after a failed attempt; doubles, half of it by chance, up to `retry_pause_max`.
RETRY_PAUSE_MIN_S = 0.05
# Whole bodies in a row, without one good range, that make an image a stream: never a single lie.
WHOLE_BODIES_MAX = 3
# Failures in a row that an operator should hear of; the others are told at INFO.
FAILURES_TOLD = 3


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
        self._wants: dict[int, Want] = {}
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
        self._is_paused = False
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
        if self._is_stopped:
            raise self._dropped()
        got: dict[int, bytes] = {}
        wants: dict[int, Want] = {}
        for chunk in chunks:
            data = self._writer.unwritten(chunk)
            if data is not None:
                got[chunk] = data
                continue
            want = self._wants.setdefault(chunk, Want(urgent))
            want.is_urgent |= urgent
            want.waiters += 1
            wants[chunk] = want
        if not wants:
            return got
        self._has_reader |= not for_lookup
        self._want(self._view.pieces(wants), urgent=urgent)
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
                    got[chunk] = want.outcome()
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
        self._want(self._view.pieces(kept), urgent=False)

    def stop(self) -> None:
        """End all flights; whoever still waits is told that the image was dropped."""
        self._is_stopped = True
        self._writer.stop()
        for scope in self._flights:
            scope.cancel()
        self._fail_all(self._dropped())

    def _dropped(self) -> GlanceUnavailable:
        return GlanceUnavailable(f"image {self._image_id}: dropped from the cache; open it again")

    # ── what is wanted ──

    def _want(self, pieces: Iterable[Piece], *, urgent: bool) -> None:
        # A stream brings everything in its own order anyway.
        if self.source != "stream":
            self._plan.want(pieces, urgent=urgent)

    def _want_ahead(self, chunks: Iterable[int]) -> None:
        absent = (chunk for chunk in chunks if not self._writer.holds(chunk))
        self._want(self._view.pieces(absent), urgent=False)

    def _leave(self, wants: dict[int, Want]) -> None:
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
            if self._wants and not self._is_streaming and self._take_slot(urgent=True):
                self._is_streaming = True
                self._nursery.start_soon(self._guarded, self._stream)
            return
        for urgent in (True, False):
            while self._plan.has_urgent if urgent else self._plan.has_background:
                if not self._take_slot(urgent=urgent):
                    break
                request = self._plan.next_request(urgent=urgent)
                assert request is not None
                self._nursery.start_soon(self._guarded, self._fly, request)

    def _take_slot(self, *, urgent: bool) -> bool:
        return self._slots.take_nowait(urgent=urgent, when_free=self._pump, for_lookup=not self._has_reader)

    async def _guarded(self, flight: Callable[..., Awaitable[None]], *args: object) -> None:
        """Run a flight in a scope that `stop` can cancel."""
        scope = trio.CancelScope()
        if self._is_stopped:
            scope.cancel()
        self._flights.add(scope)
        try:
            with scope:
                await flight(*args)
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
                cutter = Cutter(request.pieces)
                async for data in body:
                    for piece, whole in cutter.feed(data):
                        # From here the piece is the writer's, also when the write fails or is cancelled.
                        arrived += 1
                        await self._arrived(piece, whole)
            if arrived < len(request.pieces):
                raise GlanceUnavailable(f"image {self._image_id}: a body ended early without an error")
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
                self._want((piece,), urgent=any(want.is_urgent for want in wants))

    # ── the stream ──

    async def _stream(self) -> None:
        """Read the source from its start, for as long as anybody waits; to its end, if a guest does."""
        self._requests += 1
        error: LazyImgError | None = None
        try:
            size_bytes = self._view.source_size_bytes
            async with self._glance.open_stream(self._image_id, size_bytes=size_bytes) as body:
                cutter = Cutter(self._view.stream_pieces())
                async for data in body:
                    for piece, whole in cutter.feed(data):
                        await self._arrived(piece, whole)
                    for reader in self._readers:
                        reader.deadline = trio.current_time() + self._read_timeout_s
                    if not self._wants and not self._has_reader:
                        break
        except LazyImgError as exc:
            error = exc
        except Exception as exc:
            logger.exception("image %s: a stream failed in an unforeseen way", self._image_id)
            error = GlanceUnavailable(f"image {self._image_id}: internal error: {exc!r}; will retry")
        finally:
            self._slots.give_back(urgent=True)
            self._is_streaming = False
        if error is not None:
            await self._after_failure(error)
        # Whoever waits for what this stream had passed already is served by another.
        self._pump()

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
        except Exception:
            logger.exception("image %s: asking for its record failed in an unforeseen way", self._image_id)
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
        try:
            await trio.sleep(pause_s)
        finally:
            self._is_paused = False
