"""What becomes of a piece that has arrived: decoded, put together to chunks, handed to who waits, and stored.

A piece or table that is not what its format allows may be a lie of the network: it is believed when it has come
so twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import trio

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_range, chunks_of
from lazyimg.core.fetchplan import FetchPlan, Piece
from lazyimg.errors import SourceDamaged
from lazyimg.image.tablestore import TableStore
from lazyimg.image.view import View
from lazyimg.image.want import Wants
from lazyimg.image.writer import Writer

logger = logging.getLogger(__name__)

# The cluster that a reader waits for is decoded on the event loop up to this size: 256 KiB of deflate take 1 ms,
# for which the loop may be held, 2 MiB take 8; the hop to a thread costs 0.1 ms.  Others are decoded in a thread,
# or the reader's next read would wait behind them.
DECODED_ON_LOOP_BYTES_MAX = 256 << 10
# Decoded by one hop to a thread, unless a cluster alone is larger: of clusters that compress a hundredfold one
# network read brings tens of MiB.
DECODED_TOGETHER_BYTES_MAX = 1 << 20
# Copied, so that its pages are there: a read answered from memory that nobody ever wrote to fails if the daemon is
# killed while the kernel takes the answer (daemon/requestbuffers.py).
_ZEROS = bytes(bytearray(CHUNK_SIZE_BYTES))


class Arrivals:
    """The way of one image's pieces from their flights to readers and store.

    decoding: how many threads decode at once, over all images.
    """

    def __init__(
        self,
        image_id: str,
        view: View,
        plan: FetchPlan,
        wants: Wants,
        writer: Writer,
        tables: TableStore,
        decoding: trio.CapacityLimiter,
        nursery: trio.Nursery,
    ) -> None:
        self._image_id = image_id
        self._view = view
        self._plan = plan
        self._wants = wants
        self._writer = writer
        self._tables = tables
        self._decoding = decoding
        self._nursery = nursery
        # Came damaged once and somebody waits for them.
        self._doubted: set[Piece] = set()
        # Calls whose zeros are on their way to the writer.
        self._zeros_count = 0
        self._no_zeros = trio.Event()
        self._no_zeros.set()

    async def take(self, arrived: Sequence[tuple[Piece, bytes]]) -> list[Piece]:
        """Take over pieces that came together; each is in flight until its chunks are on file or given up.

        Returns those that are damaged and to be fetched once more.
        """
        doubted: list[Piece] = []
        left = dict(arrived)
        try:
            for batch in self._batches(arrived):
                for piece, presented in await self._decoded(batch):
                    data = left.pop(piece)
                    if isinstance(presented, SourceDamaged):
                        self._plan.arrived(piece)
                        doubted += [] if self._is_believed(piece, presented) else [piece]
                    elif piece in self._wants:
                        self._take_table(piece, data)
                    else:
                        await self._take_presented(piece, presented)
        finally:
            for piece in left:
                self._plan.arrived(piece)
        return doubted

    def take_zeros(self, chunks: Sequence[int]) -> dict[int, bytes]:
        """Return the bytes of chunks that have no pieces, and have them stored."""
        ranges = ((chunk, chunk_range(chunk, self._view.size_bytes)) for chunk in chunks)
        zeros = {chunk: _ZEROS[: stop - start] for chunk, (start, stop) in ranges}
        if zeros:
            if not self._zeros_count:
                self._no_zeros = trio.Event()
            self._zeros_count += 1
            self._nursery.start_soon(self._put_zeros, zeros)
        return zeros

    async def wait_no_zeros(self) -> None:
        """Wait until the writer has all that `take_zeros` returned."""
        await self._no_zeros.wait()

    async def _put_zeros(self, zeros: Mapping[int, bytes]) -> None:
        try:
            for one in zeros.items():
                await self._writer.put([one], when_done=lambda: None)
        finally:
            self._zeros_count -= 1
            if not self._zeros_count:
                self._no_zeros.set()

    def _take_table(self, piece: Piece, data: bytes) -> None:
        self._view.give_table(piece, data)
        self._nursery.start_soon(self._tables.put, piece, data)
        self._plan.arrived(piece)
        self._wants.hand_over(piece, data)

    async def _take_presented(self, piece: Piece, presented: bytes) -> None:
        self._doubted.discard(piece)
        try:
            chunks = self._view.assemble(piece, presented)
        except BaseException:
            self._plan.arrived(piece)
            raise
        for chunk, chunk_data in chunks:
            self._wants.hand_over(chunk, chunk_data)
        self._forget_orphans(piece)
        if chunks:
            await self._writer.put(chunks, when_done=lambda: self._plan.arrived(piece))
        else:
            self._plan.arrived(piece)

    def _batches(self, arrived: Sequence[tuple[Piece, bytes]]) -> Iterator[list[tuple[Piece, bytes]]]:
        """Yield what to decode at once: the first cluster that a reader waits for alone, before all the others."""
        yield [one for one in arrived if not one[0].is_compressed]
        clusters = [one for one in arrived if one[0].is_compressed]
        clusters.sort(key=lambda one: not self._has_reader(one[0]))
        batch: list[tuple[Piece, bytes]] = []
        batch_bytes = 0
        for number, one in enumerate(clusters):
            size_bytes = _presented_bytes(one[0])
            is_full = batch_bytes + size_bytes > DECODED_TOGETHER_BYTES_MAX
            if batch and (is_full or (number == 1 and self._is_for_loop(batch))):
                yield batch
                batch, batch_bytes = [], 0
            batch.append(one)
            batch_bytes += size_bytes
        if batch:
            yield batch

    async def _decoded(
        self, batch: Sequence[tuple[Piece, bytes]]
    ) -> list[tuple[Piece, bytes | SourceDamaged]]:
        if not batch or not batch[0][0].is_compressed or self._is_for_loop(batch):
            return _decode_each(self._view, batch)
        return await trio.to_thread.run_sync(_decode_each, self._view, batch, limiter=self._decoding)

    def _is_for_loop(self, batch: Sequence[tuple[Piece, bytes]]) -> bool:
        piece = batch[0][0]
        is_short = _presented_bytes(piece) <= DECODED_ON_LOOP_BYTES_MAX
        return len(batch) == 1 and is_short and self._has_reader(piece)

    def _has_reader(self, piece: Piece) -> bool:
        chunks = chunks_of(piece.presented_start, piece.presented_stop)
        return any(map(self._wants.is_urgent, chunks))

    def _is_believed(self, piece: Piece, damage: SourceDamaged) -> bool:
        """Fail who waits for a damaged piece, when it has come so twice."""
        chunks = chunks_of(piece.presented_start, piece.presented_stop)
        if piece not in self._doubted and any(chunk in self._wants for chunk in chunks):
            logger.info("image %s: asking again for bytes that came damaged: %s", self._image_id, damage)
            self._doubted.add(piece)
            return False
        self._doubted.discard(piece)
        self._wants.fail(chunks, damage)
        return True

    def _forget_orphans(self, piece: Piece) -> None:
        """Let go of chunks that this piece did not complete, that nobody waits for and no other piece will."""
        half_complete = self._view.half_complete
        for chunk in chunks_of(piece.presented_start, piece.presented_stop):
            is_wanted = chunk not in half_complete or chunk in self._wants
            if not is_wanted and not any(map(self._plan.is_pending, self._view.plan(chunk))):
                self._view.forget(chunk)


def _decode_each(
    view: View, batch: Sequence[tuple[Piece, bytes]]
) -> list[tuple[Piece, bytes | SourceDamaged]]:
    decoded: list[tuple[Piece, bytes | SourceDamaged]] = []
    for piece, data in batch:
        try:
            decoded.append((piece, view.decode(piece, data)))
        except SourceDamaged as exc:
            decoded.append((piece, exc))
    return decoded


def _presented_bytes(piece: Piece) -> int:
    return piece.presented_stop - piece.presented_start
