"""Brings absent chunks of one image: single flight, urgent first, retried until the reader's limit.

A flight belongs to the daemon's nursery, never to the reader that came first, so a cancelled reader harms
nobody.  Bytes go to those who wait for them at once, and to the store behind their back; a store that cannot
take them therefore fails no read.  Guards I3, I4 and I5.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import trio

from lazyimg.core.chunks import chunks_of
from lazyimg.core.fetchplan import FetchPlan, Piece, Request
from lazyimg.errors import GlanceUnavailable, LazyImgError, SourceDamaged
from lazyimg.image.arrivals import Arrivals
from lazyimg.image.backoff import Backoff
from lazyimg.image.brake import Brake
from lazyimg.image.flights import Flights
from lazyimg.image.ladder import Ladder
from lazyimg.image.slots import Slots
from lazyimg.image.source import Cutter, Glance, SourceKind
from lazyimg.image.tablestore import TableStore
from lazyimg.image.view import View
from lazyimg.image.want import Cause, Want, Wants
from lazyimg.image.writer import Writer

logger = logging.getLogger(__name__)


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
        tables: TableStore,
        slots: Slots,
        brake: Brake,
        decoding: trio.CapacityLimiter,
        nursery: trio.Nursery,
        *,
        request_bytes_max: int,
        read_timeout_s: float,
        retry_pause_max_s: float,
    ) -> None:
        self.read_timeout_s = read_timeout_s
        self._image_id = image_id
        self._view = view
        self._glance = glance
        self._writer = writer
        self._tables = tables
        self._slots = slots
        self._brake = brake
        self._backoff = Backoff(image_id, retry_pause_max_s, glance.wait_recovered)
        self._plan = FetchPlan(request_bytes_max)
        self._wants = Wants(image_id, self._plan, view, read_timeout_s)
        self._arrivals = Arrivals(image_id, view, self._plan, self._wants, writer, tables, decoding, nursery)
        self._flights = Flights(nursery)
        self.ladder = Ladder(image_id, glance, may_step_down=view.is_streamable)
        self._is_streaming = False
        # How far any stream has come.
        self.streamed_bytes_max = 0
        # False while only lookups want bytes: their flights may take the slots kept for them, and their stream ends
        # when it has what they want.  One for a reader goes to the end, since the next would begin at zero again.
        self._has_reader = False
        # Why Glance is not asked for bytes.
        self.refusal: LazyImgError | None = None
        self._requests = 0
        self._fetched_bytes = 0

    @property
    def source(self) -> SourceKind:
        """Where the image's bytes come from."""
        return self.ladder.source

    @property
    def is_idle(self) -> bool:
        return not self._flights and not self._wants and self._writer.is_idle

    def statistics(self) -> FetchStatistics:
        """Return a snapshot of the counters."""
        error = None if self._wants.last_error is None else str(self._wants.last_error)
        retries = self._backoff.retries
        return FetchStatistics(self._requests, self._fetched_bytes, retries, len(self._wants), error)

    def waits_for(self, chunks: Iterable[int]) -> Cause | None:
        """Say what keeps these chunks from coming, None if nobody waits here for any of them."""
        return self._wants.cause(chunks, is_streaming=self._is_streaming, is_paused=self._backoff.is_paused)

    async def fetch(
        self,
        chunks: Sequence[int],
        *,
        ahead: Iterable[int] = (),
        urgent: bool = True,
        for_lookup: bool = False,
        at_pace: bool = False,
    ) -> dict[int, bytes]:
        """Return the bytes of absent chunks, waiting for them; want those of `ahead` too, waiting for none.

        Urgent wants wait `read_timeout`, on a stream that long without progress, then raise ReadTimeout; others
        wait as long as it takes.  at_pace: a stream that brings them may be slowed down.  Raises ImageNotFound or
        ImageForbidden once Glance's record of the image itself says so, SourceDamaged where the source is not what
        its format allows.  Cancellation leaves the flights as they are.
        """
        if self._flights.is_stopped:
            raise self._dropped()
        self._has_reader |= not for_lookup
        with self._wants.limit(chunks, urgent=urgent), nullcontext() if at_pace else self._brake.off():
            while True:
                try:
                    await self._need_tables(chunks, urgent=urgent)
                    return await self._fetch_mapped(chunks, ahead, urgent=urgent)
                except SourceDamaged as exc:
                    if not self._doubt_tables(chunks):
                        raise SourceDamaged(f"image {self._image_id}: {exc}") from exc
        raise AssertionError("unreachable: the limit raises")

    async def wait_written(self) -> None:
        """Wait until all that has arrived is on file or given up."""
        await self._arrivals.wait_no_zeros()
        await self._writer.wait_idle()

    def want_background(self, chunks: Iterable[int]) -> None:
        """Ask for absent chunks that somebody may need soon; nobody waits, and a failure forgets them."""
        self._want_ahead(chunks)
        self._pump()

    def abandon_background(self) -> None:
        """Forget what nobody waits for; flights under way are let arrive, a stream ends when it can."""
        self._has_reader = False
        self._plan.abandon_background()
        for chunk in self._view.half_complete:
            if chunk not in self._wants:
                self._view.forget(chunk)
        for piece in self._wants.missing_pieces(urgent=False):
            self._want((piece,), urgent=False)
        self._note_guesses()

    def refuse(self, reason: LazyImgError | None) -> None:
        """Fetch nothing any more, and tell so whoever waits; None: fetch again."""
        self.refusal = reason
        if reason is not None:
            self._wants.last_error = reason
            self._plan.abandon_background()
            self._wants.fail(list(self._wants), reason)

    def stop(self) -> None:
        """End all flights; whoever still waits is told that the image was dropped."""
        self._flights.stop()
        self._writer.stop()
        self._wants.fail(list(self._wants), self._dropped())
        self._note_guesses()

    def _dropped(self) -> GlanceUnavailable:
        return GlanceUnavailable(f"image {self._image_id}: dropped from the cache; open it again")

    # ── what is wanted ──

    def _want(self, pieces: Iterable[Piece], *, urgent: bool) -> None:
        # A stream brings everything in its own order anyway.
        if self.source != "stream":
            self._plan.want(pieces, urgent=urgent)

    def _want_ahead(self, chunks: Iterable[int]) -> None:
        # Guesses are the first to go: while readers wait for a slot, or Glance fails, and where many wait already.
        if self.refusal is not None or self._slots.is_crowded or self._backoff.is_paused:
            return
        absent = [chunk for chunk in chunks if not self._writer.holds(chunk) and chunk not in self._wants]
        absent = absent[: self._slots.guesses.room(self)]
        try:
            # A guess is not worth fetching tables for.
            if absent and not self._view.missing_tables(absent):
                self._want([piece for chunk in absent for piece in self._view.plan(chunk)], urgent=False)
        except SourceDamaged:
            # Whoever reads there is told.
            return
        self._note_guesses()

    def _note_guesses(self) -> None:
        self._slots.guesses.note(self, 0 if self._flights.is_stopped else self._plan.background_count)

    async def _fetch_mapped(
        self, chunks: Sequence[int], ahead: Iterable[int], *, urgent: bool
    ) -> dict[int, bytes]:
        """`fetch`, once no table is missing."""
        got: dict[int, bytes] = {}
        zeros: list[int] = []
        wants: dict[int, Want] = {}
        try:
            # No `await` before all is wanted: what arrives meanwhile would be wanted twice.
            for chunk in chunks:
                data = self._writer.unwritten(chunk)
                if data is not None:
                    got[chunk] = data
                elif chunk in self._wants or self._view.plan(chunk):
                    wants[chunk] = self._join(chunk, urgent=urgent)
                else:
                    zeros.append(chunk)
            got |= self._arrivals.take_zeros(zeros)
            self._want_ahead(ahead)
            self._pump()
            got |= await self._wants.outcomes(wants)
        finally:
            self._wants.leave(wants)
        return got

    async def _need_tables(self, chunks: Sequence[int], *, urgent: bool) -> None:
        """Have the view's tables for these chunks, from the cache or else from Glance."""
        while missing := self._view.missing_tables(chunks):
            kept = await self._tables.get(missing)
            for piece, data in kept.items():
                self._view.give_table(piece, data)
            wants: dict[Piece, Want] = {}
            try:
                for piece in missing:
                    if piece not in kept:
                        wants[piece] = self._join(piece, urgent=urgent)
                self._pump()
                await self._wants.outcomes(wants)
            finally:
                self._wants.leave(wants)

    def _doubt_tables(self, chunks: Sequence[int]) -> bool:
        """Have the tables of damaged chunks fetched anew; False if they have been: they are what the source has."""
        doubtful = self._tables.distrust(self._view.tables_of(chunks))
        for piece in doubtful:
            self._view.forget_table(piece)
        return bool(doubtful)

    def _join(self, key: int | Piece, *, urgent: bool) -> Want:
        if self.refusal is not None:
            raise type(self.refusal)(str(self.refusal)) from self.refusal
        is_known = key in self._wants
        want = self._wants.join(key, urgent=urgent)
        if not is_known:
            self._want(want.pieces, urgent=urgent)
        elif urgent:
            self._plan.hasten(want.pieces)
        return want

    def _pump(self) -> None:
        """Start the flights that may start now.  Synchronous, so that plan and slots agree."""
        if self._backoff.is_paused or self._flights.is_stopped:
            return
        if self.source == "stream":
            if self._wants and not self._is_streaming and self._take_slot(urgent=True):
                self._is_streaming = True
                self._flights.start(self._stream)
            return
        for urgent in (True, False):
            while self._plan.has_urgent if urgent else self._plan.has_background:
                if not self._take_slot(urgent=urgent):
                    break
                request = self._plan.next_request(urgent=urgent)
                assert request is not None
                self._flights.start(self._fly, request)
        self._note_guesses()

    def _take_slot(self, *, urgent: bool) -> bool:
        return self._slots.take_nowait(urgent=urgent, when_free=self._pump, for_lookup=not self._has_reader)

    # ── ranges ──

    async def _fly(self, request: Request) -> None:
        """Send one request and hand its pieces on as they arrive."""
        self._requests += 1
        arrived = 0
        error: LazyImgError | None = None
        try:
            start, stop, size_bytes = request.start, request.stop, self._view.source_size_bytes
            body_of = self._glance.open_range(
                self._image_id, start, stop, size_bytes=size_bytes, is_urgent=request.is_urgent
            )
            async with body_of as body:
                cutter = Cutter(request.pieces)
                async for data in body:
                    if not data:
                        # A spool tells so that its stream goes on.
                        self._wants.prolong()
                    pieces = list(cutter.feed(data))
                    if pieces:
                        # From here they are the writer's, also when the write fails or is cancelled.
                        arrived += len(pieces)
                        self._backoff.succeeded()
                        await self._arrived(pieces)
            if arrived < len(request.pieces):
                raise GlanceUnavailable(f"image {self._image_id}: a body ended early without an error")
            self.ladder.range_came()
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
            self._want_again(request.pieces)
            await self._after_failure(error)
        self._pump()

    async def _arrived(self, pieces: Sequence[tuple[Piece, bytes]]) -> None:
        self._fetched_bytes += sum(len(data) for _, data in pieces)
        doubted = await self._arrivals.take(pieces)
        if doubted:
            self._want_again(doubted)

    def _want_again(self, pieces: Sequence[Piece]) -> None:
        """Want again, of the pieces that a flight lost, what somebody waits for."""
        lost = set(pieces)
        for urgent in (True, False):
            wanted = self._wants.missing_pieces(urgent=urgent)
            self._want([piece for piece in wanted if piece in lost], urgent=urgent)
        for piece in lost:
            for chunk in chunks_of(piece.presented_start, piece.presented_stop):
                if chunk not in self._wants:
                    self._view.forget(chunk)

    # ── the stream ──

    async def _stream(self) -> None:
        """Read the source from its start, for as long as anybody waits; to its end, if a guest does."""
        self._requests += 1
        error: LazyImgError | None = None
        try:
            size_bytes = self._view.source_size_bytes
            with self._brake.stream(partial(self._slots.give_back, urgent=True)):
                async with self._glance.open_stream(self._image_id, size_bytes=size_bytes) as body:
                    await self._take_stream(body)
        except LazyImgError as exc:
            error = exc
        except Exception as exc:
            logger.exception("image %s: a stream failed in an unforeseen way", self._image_id)
            error = GlanceUnavailable(f"image {self._image_id}: internal error: {exc!r}; will retry")
        finally:
            self._is_streaming = False
        if error is not None:
            await self._after_failure(error)
        # Whoever waits for what this stream had passed already is served by another.
        self._pump()

    async def _take_stream(self, body: AsyncIterator[bytes]) -> None:
        cutter = Cutter(self._view.stream_pieces())
        received_bytes = 0
        async for data in body:
            received_bytes += len(data)
            await self._arrived(list(cutter.feed(data)))
            # To come again as far as before is no progress: a stream that always breaks at one place must not keep
            # those behind it waiting for ever.
            if received_bytes > self.streamed_bytes_max:
                self.streamed_bytes_max = received_bytes
                self._backoff.succeeded()
                self._wants.prolong()
            is_needed = self._wants or self._has_reader
            if not is_needed or not await self._brake.pay(len(data)):
                break

    # ── failures ──

    async def _after_failure(self, error: LazyImgError) -> None:
        """Decide what a failed attempt means; pauses, but never longer than a waiting guest may be kept."""
        self._wants.last_error = error
        was_stream = self.source == "stream"
        verdict, self._wants.last_error = await self.ladder.judge(error)
        if verdict == "final":
            self._wants.fail(list(self._wants), self._wants.last_error)
        elif verdict == "again":
            await self._backoff.pause(self._wants.last_error)
        elif not was_stream:
            # A stream brings everything in its own order anyway.
            self._plan.abandon_background()
            for urgent in (True, False):
                self._plan.abandon(self._wants.missing_pieces(urgent=urgent))
