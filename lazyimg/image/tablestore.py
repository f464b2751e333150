"""Tables of a source, kept in the cache so that mapped chunks need no Glance; losing one costs a request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from lazyimg.core.fetchplan import Piece
from lazyimg.image.diskhealth import DiskHealth

logger = logging.getLogger(__name__)

# Tables of an image that are fetched anew since the daemon started; more are believed.
DISTRUSTED_MAX = 1000


class TableFile(Protocol):
    """What is needed of a chunk file; both block."""

    def table(self, start: int, stop: int) -> bytes | None: ...

    def put_table(self, start: int, data: bytes) -> None: ...


class TableStore:
    """One image's tables on disk; those in the source's first `head_bytes` are there with these."""

    def __init__(
        self, file: TableFile, disk: DiskHealth, limiter: trio.CapacityLimiter, head_bytes: int = 0
    ) -> None:
        self._file = file
        self._disk = disk
        self._head_bytes = head_bytes
        # Fetched anew since this daemon started; True until that copy is on disk.
        self._distrusted: dict[Piece, bool] = {}
        self._limiter = limiter

    async def get(self, pieces: Sequence[Piece]) -> dict[Piece, bytes]:
        """Return those of the tables that are here and can be read."""
        trusted = [piece for piece in pieces if not self._distrusted.get(piece)]
        try:
            return await self._disk.read(self._get, trusted, limiter=self._limiter)
        except OSError as exc:
            logger.info("tables were not read: %s", exc)
            return {}

    def distrust(self, pieces: Sequence[Piece]) -> list[Piece]:
        """Give tables up: they, or what they point to, came damaged.  Returns them, but none a second time."""
        doubtful = [piece for piece in pieces if piece not in self._distrusted]
        del doubtful[max(DISTRUSTED_MAX - len(self._distrusted), 0) :]
        self._distrusted |= dict.fromkeys(doubtful, True)
        return doubtful

    async def put(self, piece: Piece, data: bytes) -> None:
        """Keep a table; never raises, for the tables of an image that cannot be kept are fetched again."""
        try:
            await self._disk.write(self._file.put_table, piece.start, data, limiter=self._limiter)
        except OSError as exc:
            logger.info("a table was not kept: %s", exc)
        else:
            if piece in self._distrusted:
                self._distrusted[piece] = False

    def _get(self, pieces: Sequence[Piece]) -> dict[Piece, bytes]:
        found: dict[Piece, bytes] = {}
        for piece in pieces:
            data = self._file.table(piece.start, piece.stop)
            if data is not None:
                found[piece] = data
        in_head = [piece for piece in pieces if piece not in found and piece.stop <= self._head_bytes]
        head = self._file.table(0, self._head_bytes) if in_head else None
        if head is not None:
            found |= {piece: head[piece.start : piece.stop] for piece in in_head}
        return found
