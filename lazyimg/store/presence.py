"""Which chunks of one file are present, and which of those are proven: in memory, paged, above the index.

Knows no file.  Guards invariant 2: a chunk that was written counts as durable only once `commit` stored it,
and `forget` tells the index before anyone may overwrite the bytes.

    ABSENT ──set_written──► UNPROVEN (in `_written`) ──commit──► PROVEN
       ▲                                                          │
       │                    UNPROVEN (in the index) ──set_proven──┤
       └──────────────────── forget, fail ────────────────────────┘

A page can leave memory at any time: the index and `_written` hold all that matters, only the proof is lost.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping

from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import PAGE_CHUNKS, Index

ABSENT, UNPROVEN, PROVEN = 0, 1, 2
# 1 KiB each: 16 MiB of memory for 1 TiB of images in use.
PAGES_MAX = 16384

log = logging.getLogger(__name__)


class PageLimit:
    """Keeps at most `pages_max` pages of presence in memory, over all files; the first loaded leave first.

    Order of loading instead of use spares the hot path any bookkeeping; a page that leaves too early costs
    one look at the index and one checksum for each of its chunks that is read again.
    """

    def __init__(self, pages_max: int = PAGES_MAX) -> None:
        self._pages_max = pages_max
        self._loaded: OrderedDict[tuple[Presence, int], None] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._loaded)

    def note_loaded(self, presence: Presence, page_no: int) -> None:
        """Count a page that was loaded; drop the oldest above the limit."""
        with self._lock:
            self._loaded[presence, page_no] = None
            while len(self._loaded) > self._pages_max:
                (oldest, oldest_page_no), _ = self._loaded.popitem(last=False)
                oldest.pages.pop(oldest_page_no, None)

    def remove(self, presence: Presence) -> None:
        """Drop all pages of one file."""
        with self._lock:
            for page_no in list(presence.pages):
                self._loaded.pop((presence, page_no), None)
            presence.pages.clear()


class Presence:
    """The chunk states of one file.  What ends in `_nowait` does not block; all else may read the index.

    pages: page number to PAGE_CHUNKS states, one byte each.  Read by the event loop while threads change it:
    each single access is atomic under the interpreter's lock, and a reader needs no more than one.
    """

    def __init__(self, index: Index, entry: ImageEntry, limit: PageLimit) -> None:
        self.pages: dict[int, bytearray] = {}
        self._index = index
        self._key, self._generation = entry.key, entry.generation
        self._durable_count = entry.present_count
        self._limit = limit
        # Checksums of chunks that are written and not yet durable; the index has none of them, unless it
        # could not be told to forget one.
        self._written: dict[int, int] = {}
        # Guards _written, the states and _version; never held across I/O.
        self._lock = threading.Lock()
        # Grows with each change that a page read from the index before it would not show.
        self._version = 0
        # Held across changes of the index: a page is read, changed and stored as one.
        self._index_lock = threading.Lock()

    @property
    def present_count(self) -> int:
        """Chunks present, durable or not."""
        return self._durable_count + len(self._written)

    @property
    def written_count(self) -> int:
        """Chunks written and not yet durable."""
        return len(self._written)

    def states(self, chunks: range) -> bytes:
        """Return one state a chunk; pages not in memory are loaded."""
        states = bytearray()
        for page_no, offsets in _by_page(chunks):
            page = self.pages.get(page_no)
            states += (self._load(page_no) if page is None else page)[offsets.start : offsets.stop]
        return bytes(states)

    def states_nowait(self, chunks: range) -> bytes | None:
        """Return one state a chunk, or None if a page is not in memory."""
        states = bytearray()
        for page_no, offsets in _by_page(chunks):
            page = self.pages.get(page_no)
            if page is None:
                return None
            states += page[offsets.start : offsets.stop]
        return bytes(states)

    def sums(self, chunks: range) -> list[int]:
        """Return the checksum each chunk must have, 0 for absent ones."""
        with self._lock:
            written = {chunk: self._written[chunk] for chunk in chunks if chunk in self._written}
        sums: list[int] = []
        for page_no, offsets in _by_page(chunks):
            if len(written) < len(chunks):
                sums += self._index.page(self._key, self._generation, page_no)[offsets.start : offsets.stop]
            else:
                sums += [0] * len(offsets)
        return [written.get(chunk, known) for chunk, known in zip(chunks, sums, strict=True)]

    def sums_nowait(self, chunks: range) -> list[int | None]:
        """Return what is known of each chunk's checksum without the index: None where it needs none, being proven."""
        states = self.states_nowait(chunks) or bytes(len(chunks))
        return [
            None if state == PROVEN else self._written.get(chunk, 0)
            for chunk, state in zip(chunks, states, strict=True)
        ]

    def written_sum_nowait(self, chunk: int) -> int | None:
        """Return the checksum of a chunk that is written and not yet durable, else None."""
        return self._written.get(chunk)

    def set_written(self, sums: Mapping[int, int]) -> None:
        """Mark chunks present whose bytes have reached the file.  They must have been absent."""
        with self._lock:
            self._version += 1
            self._written.update(sums)
            self._set_states(sums, UNPROVEN)

    def set_proven(self, chunks: Iterable[int]) -> None:
        """Mark chunks whose bytes were just found to have their checksum; not those that changed since."""
        with self._lock:
            for chunk in chunks:
                page = self.pages.get(chunk // PAGE_CHUNKS)
                offset = chunk % PAGE_CHUNKS
                # Until they are durable a failed write-back could still take the bytes away: not proven yet.
                if page is not None and page[offset] == UNPROVEN and chunk not in self._written:
                    page[offset] = PROVEN

    def written(self) -> dict[int, int]:
        """Return the checksums of what is written so far, for `commit` once the file is synced."""
        with self._lock:
            return dict(self._written)

    def commit(self, sums: Mapping[int, int]) -> None:
        """Store durably that chunks are present whose bytes are durable.  If OSError: nothing changed."""
        with self._index_lock:
            # What was forgotten since the file was synced must not come back.
            with self._lock:
                sums = {chunk: value for chunk, value in sums.items() if self._written.get(chunk) == value}
            durable_count = self._store(sums)
            with self._lock:
                self._version += 1
                self._durable_count = durable_count
                for chunk in sums:
                    del self._written[chunk]
                self._set_states(sums, PROVEN)

    def fail(self, sums: Mapping[int, int]) -> None:
        """Make chunks absent again whose bytes did not become durable."""
        with self._lock:
            self._version += 1
            lost = [chunk for chunk, value in sums.items() if self._written.get(chunk) == value]
            for chunk in lost:
                del self._written[chunk]
            self._set_states(lost, ABSENT)

    def forget(self, chunks: Collection[int]) -> None:
        """Make chunks absent, durably.

        If the index cannot be written OSError is raised, and they are absent all the same for this process;
        in the next one their checksum protects the reader.
        """
        with self._index_lock:
            durable_count = self._durable_count
            try:
                durable_count = self._store(dict.fromkeys(chunks, 0), drops=True)
            finally:
                with self._lock:
                    self._version += 1
                    self._durable_count = durable_count
                    for chunk in chunks:
                        self._written.pop(chunk, None)
                    self._set_states(chunks, ABSENT)

    def unload(self, chunks: Iterable[int]) -> None:
        """Take the pages of these chunks out of memory; the next look reads the index."""
        for page_no in {chunk // PAGE_CHUNKS for chunk in chunks}:
            self.pages.pop(page_no, None)

    def close(self) -> None:
        """Give the memory back."""
        self._limit.remove(self)

    def _load(self, page_no: int) -> bytearray:
        while True:
            version = self._version
            try:
                sums = self._index.page(self._key, self._generation, page_no)
            except OSError as exc:
                # As good as absent, for now: fetching again is slower than a present chunk and better than an
                # error.
                log.warning("presence of %s, page %d, is not known: %s", self._key, page_no, exc)
                sums = None
            page = bytearray(PAGE_CHUNKS) if sums is None else bytearray(map(bool, sums))
            with self._lock:
                # A commit, a write or a forgetting while the index was read: read it again.
                if version != self._version:
                    continue
                first = page_no * PAGE_CHUNKS
                for chunk in self._written:
                    if first <= chunk < first + PAGE_CHUNKS:
                        page[chunk - first] = UNPROVEN
                if sums is None:
                    return page
                # Another thread may have loaded it meanwhile and proven some of it.
                page = self.pages.setdefault(page_no, page)
            self._limit.note_loaded(self, page_no)
            return page

    def _store(self, sums: Mapping[int, int], *, drops: bool = False) -> int:
        """Store changed checksums; return the durable count after it."""
        pages: dict[int, list[int]] = {}
        durable_count = self._durable_count
        for chunk, value in sums.items():
            page_no, offset = divmod(chunk, PAGE_CHUNKS)
            if page_no not in pages:
                pages[page_no] = list(self._index.page(self._key, self._generation, page_no))
            durable_count += bool(value) - bool(pages[page_no][offset])
            pages[page_no][offset] = value
        self._index.commit(self._key, self._generation, pages, durable_count, drops=drops)
        return durable_count

    def _set_states(self, chunks: Iterable[int], state: int) -> None:
        for chunk in chunks:
            page = self.pages.get(chunk // PAGE_CHUNKS)
            if page is not None:
                page[chunk % PAGE_CHUNKS] = state


def _by_page(chunks: range) -> Iterable[tuple[int, range]]:
    """Return each page a range of chunks touches, with the part of the page it covers."""
    assert chunks.step == 1, chunks
    for page_no in range(chunks.start // PAGE_CHUNKS, -(-chunks.stop // PAGE_CHUNKS) if chunks else 0):
        first = page_no * PAGE_CHUNKS
        yield page_no, range(max(chunks.start - first, 0), min(chunks.stop - first, PAGE_CHUNKS))
