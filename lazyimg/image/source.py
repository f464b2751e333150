"""Where an image's bytes come from: what is asked of Glance, and how a body becomes pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol

from lazyimg.core.fetchplan import Piece
from lazyimg.core.identity import ImageRecord

SourceKind = Literal["ranges", "location", "stream"]


class Glance(Protocol):
    """One attempt a call; errors of lazyimg.errors."""

    async def image(self, image_id: str) -> ImageRecord: ...

    async def wait_recovered(self) -> None:
        """Wait until a Glance that did not answer does again."""
        ...

    def open_range(
        self,
        image_id: str,
        start: int,
        stop: int,
        *,
        size_bytes: int,
        checksum: str | None = None,
        is_urgent: bool = False,
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...

    def open_stream(
        self, image_id: str, *, size_bytes: int, checksum: str | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...


class Cutter:
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
