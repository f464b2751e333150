"""Says what a guest will probably read next; never awaited, and it may be wrong.

The window of a read that has to be fetched joins the reader's own request, since it is adjacent; a sequence is
kept ahead of while it finds its bytes present.
"""

from __future__ import annotations

from lazyimg.core.chunks import chunks_of
from lazyimg.core.readahead import Readahead
from lazyimg.store.chunkfile import ChunkFile


class Prefetcher:
    """The read-ahead of one image."""

    def __init__(self, file: ChunkFile, readahead: Readahead) -> None:
        self._file = file
        self._readahead = readahead
        # The last window of a hit: until a read has come half way through it there is nothing to say, and
        # saying so is a matter of two comparisons on the way of every read.
        self._quiet_start = 0
        self._quiet_stop = 0

    def after_miss(self, start: int, stop: int) -> list[int]:
        """Return the chunks behind the read `[start, stop)` worth fetching with it, up to the first that is here."""
        return self._run_of_absent(stop, start + self._readahead.window_bytes(start, stop, is_hit=False))

    def after_hit(self, start: int, stop: int) -> list[int]:
        """Return the chunks worth fetching in the background now that `[start, stop)` was found present."""
        if self._quiet_start <= start and stop <= self._quiet_stop:
            return []
        window_bytes = self._readahead.window_bytes(start, stop, is_hit=True)
        self._quiet_start = start
        self._quiet_stop = max(stop, start + window_bytes // 2)
        return self._run_of_absent(stop, start + window_bytes)

    def _run_of_absent(self, start: int, stop: int) -> list[int]:
        chunks = chunks_of(start, min(stop, self._file.size_bytes))
        # What is not known without a thread is not worth one.
        absent = self._file.absent_nowait(chunks)
        if not absent:
            return []
        first = absent[0]
        return [chunk for i, chunk in enumerate(absent) if chunk == first + i]
