"""Tables of a source, kept in the cache so that mapped chunks need no Glance; losing one costs a request."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import trio

from lazyimg.core.fetchplan import Piece

logger = logging.getLogger(__name__)


class TableFile(Protocol):
    """What is needed of a chunk file; both block."""

    def table(self, start: int, stop: int) -> bytes | None: ...

    def put_table(self, start: int, data: bytes) -> None: ...


class TableStore:
    """One image's tables on disk."""

    def __init__(self, file: TableFile, limiter: trio.CapacityLimiter) -> None:
        self._file = file
        self._limiter = limiter

    async def get(self, pieces: Sequence[Piece]) -> dict[Piece, bytes]:
        """Return those of the tables that are here."""
        return await trio.to_thread.run_sync(self._get, pieces, limiter=self._limiter)

    async def put(self, piece: Piece, data: bytes) -> None:
        """Keep a table; never raises, for the tables of an image that cannot be kept are fetched again."""
        try:
            await trio.to_thread.run_sync(self._file.put_table, piece.start, data, limiter=self._limiter)
        except OSError as exc:
            logger.info("a table was not kept: %s", exc)

    def _get(self, pieces: Sequence[Piece]) -> dict[Piece, bytes]:
        found: dict[Piece, bytes] = {}
        for piece in pieces:
            try:
                data = self._file.table(piece.start, piece.stop)
            except OSError as exc:
                logger.info("a table was not read: %s", exc)
                continue
            if data is not None:
                found[piece] = data
        return found
