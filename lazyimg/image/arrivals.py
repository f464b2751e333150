"""What becomes of a piece that has arrived: decoded, put together to chunks, handed to who waits, and stored.

A piece or table that is not what its format allows may be a lie of the network: it is believed when it has come
so twice.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import trio

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_range, chunks_of
from lazyimg.core.fetchplan import FetchPlan, Piece
from lazyimg.errors import SourceDamaged
from lazyimg.image.tablestore import TableStore
from lazyimg.image.view import View
from lazyimg.image.want import Wants
from lazyimg.image.writer import Writer

logger = logging.getLogger(__name__)

# A larger cluster is decoded in a thread: 256 KiB of deflate take 1 ms, for which the loop may be held, 2 MiB take 8;
# the hop to a thread costs 0.1 ms.
DECODED_ON_LOOP_BYTES_MAX = 256 << 10
_ZEROS = bytes(CHUNK_SIZE_BYTES)


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

    async def take(self, piece: Piece, data: bytes) -> bool:
        """Take a piece over; it is in flight until its chunks are on file or given up.

        Returns False where it is damaged and to be fetched once more.
        """
        if piece in self._wants:
            self._view.give_table(piece, data)
            self._nursery.start_soon(self._tables.put, piece, data)
            self._plan.arrived(piece)
            self._wants.hand_over(piece, data)
            return True
        try:
            presented = await self._decoded(piece, data)
        except SourceDamaged as exc:
            self._plan.arrived(piece)
            return self._is_believed(piece, exc)
        except BaseException:
            self._plan.arrived(piece)
            raise
        self._doubted.discard(piece)
        chunks = self._view.assemble(piece, presented)
        for chunk, chunk_data in chunks:
            self._wants.hand_over(chunk, chunk_data)
        self._forget_orphans(piece)
        if chunks:
            await self._writer.put(chunks, when_done=lambda: self._plan.arrived(piece))
        else:
            self._plan.arrived(piece)
        return True

    def take_zeros(self, chunks: Sequence[int]) -> dict[int, bytes]:
        """Return the bytes of chunks that have no pieces, and have them stored."""
        ranges = ((chunk, chunk_range(chunk, self._view.size_bytes)) for chunk in chunks)
        zeros = {chunk: _ZEROS[: stop - start] for chunk, (start, stop) in ranges}
        if zeros:
            self._nursery.start_soon(self._put_zeros, zeros)
        return zeros

    async def _put_zeros(self, zeros: Mapping[int, bytes]) -> None:
        for one in zeros.items():
            await self._writer.put([one], when_done=lambda: None)

    async def _decoded(self, piece: Piece, data: bytes) -> bytes:
        is_short = piece.presented_stop - piece.presented_start <= DECODED_ON_LOOP_BYTES_MAX
        if is_short or not piece.is_compressed:
            return self._view.decode(piece, data)
        return await trio.to_thread.run_sync(self._view.decode, piece, data, limiter=self._decoding)

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
