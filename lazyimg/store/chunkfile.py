"""One sparse file with the presented bytes of one image, and the proof that they are right.

Synchronous: the event loop calls only what ends in `_nowait`, threads the rest.  Guards invariants 1 and 2: a
read returns bytes only of chunks whose checksum was verified since this process opened the file, or of none.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_count, chunk_range, chunks_of
from lazyimg.errors import ChunkAbsent, ChunkDamaged, ChunkUnreadable
from lazyimg.store.checksum import checksum, checksums
from lazyimg.store.descriptor import Descriptor
from lazyimg.store.entry import ImageEntry
from lazyimg.store.fileio import pread_all, pwrite_sparse
from lazyimg.store.index import PAGE_CHUNKS, Index
from lazyimg.store.presence import ABSENT, PROVEN, PageLimit, Presence

# The largest read the kernel sends (FUSE_MAX_MAX_PAGES of 256 pages).
READ_BYTES_MAX = 1 << 20
_RUN_CHUNKS = READ_BYTES_MAX // CHUNK_SIZE_BYTES

log = logging.getLogger(__name__)


class ChunkFile:
    """A chunk file, opened by `CacheDir.open_image`.

    size_bytes: presented bytes; chunk_count: chunks in them, of which the last may be short.
    At most one ChunkFile a file exists in a process, and one process a cache folder.
    """

    def __init__(
        self,
        path: Path,
        descriptor: Descriptor,
        index: Index,
        entry: ImageEntry,
        limit: PageLimit,
        buffer: memoryview,
    ) -> None:
        """Stand for the file of the entry's generation, which is opened when it is first needed.

        path: for messages.  buffer: READ_BYTES_MAX bytes for `read_nowait`; shared by all files of one event loop.
        """
        self.path = path
        self.key = entry.key
        self.size_bytes = entry.size_bytes
        self.chunk_count = chunk_count(entry.size_bytes)
        self._index = index
        self._presence = Presence(index, entry, limit)
        self._pages = self._presence.pages
        self._buffer = buffer
        # Chunks that were found damaged since the file was opened.
        self.damaged_count = 0
        self._descriptor = descriptor
        # One write at a time: what is absent when a write begins is then absent until it ends.
        self._write_lock = threading.Lock()
        self._commit_lock = threading.Lock()

    @property
    def present_count(self) -> int:
        """Chunks present, durable or not."""
        # A chunk that the index could not be told to forget may count twice until the next commit.
        return min(self._presence.present_count, self.chunk_count)

    @property
    def written_count(self) -> int:
        """Chunks written and waiting for `commit`."""
        return self._presence.written_count

    @property
    def is_whole(self) -> bool:
        """True if every chunk is present."""
        return self.present_count == self.chunk_count

    @property
    def has_descriptor(self) -> bool:
        """True if the file takes a descriptor of this process now."""
        return self._descriptor.number >= 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes the file takes on disk."""
        with self._descriptor.in_use() as fd:
            return os.fstat(fd).st_blocks * 512

    def absent_nowait(self, chunks: range) -> list[int] | None:
        """Return which of these chunks are absent; None if not in memory: call `absent` in a thread."""
        states = self._presence.states_nowait(chunks)
        return None if states is None else [chunks[i] for i, state in enumerate(states) if state == ABSENT]

    def absent(self, chunks: range) -> list[int]:
        """Return which of these chunks are absent (thread); `absent_nowait` then knows them for a while."""
        states = self._presence.states(chunks)
        return [chunks[i] for i, state in enumerate(states) if state == ABSENT]

    def read_nowait(self, start: int, stop: int) -> memoryview | None:
        """Return the bytes `[start, stop)`, not empty and within the file, or None: ask `read` in a thread.

        Only for chunks that are proven, or just written, and bytes in the page cache.  Called from one thread
        only.  The view is of a shared buffer, overwritten by the next call on any file: use it before the next
        `await`.  A copy would cost as much as the read itself.
        """
        first = start // CHUNK_SIZE_BYTES
        last = (stop - 1) // CHUNK_SIZE_BYTES
        page = self._pages.get(first // PAGE_CHUNKS)
        if page is None:
            return None
        first_offset = first % PAGE_CHUNKS
        count = last - first + 1
        if page.count(PROVEN, first_offset, first_offset + count) != count:
            return self._read_unproven_nowait(start, stop, range(first, last + 1))
        return self._pread_nowait(start, stop)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes `[start, stop)` within the file (thread), having verified what was not yet proven.

        Raises ChunkAbsent; ChunkDamaged for chunks that are not what was stored, absent from then on; and
        ChunkUnreadable for those that the disk fails to read, which may pass, or OSError where the index does.
        """
        assert 0 <= start <= stop <= self.size_bytes, (start, stop, self.size_bytes)
        chunks = chunks_of(start, stop)
        with self._descriptor.in_use() as fd:
            states = self._presence.states(chunks)
            absent = [chunks[i] for i, state in enumerate(states) if state == ABSENT]
            if absent:
                raise self._absent(absent)
            if states.count(PROVEN) == len(states):
                data, damaged = self._read_proven(fd, start, stop)
            else:
                data, damaged, absent = self._read_checked(fd, chunks)
                data = data[start - chunks.start * CHUNK_SIZE_BYTES :][: stop - start]
        if damaged:
            raise self._damaged(damaged)
        if absent:
            raise self._absent(absent)
        self._presence.set_proven(chunks)
        return data

    def write(self, first_chunk: int, data: Sequence[bytes | bytearray | memoryview]) -> None:
        """Store whole chunks from `first_chunk` on (thread): present from now on, durable after `commit`.

        Chunks that are present already stay as they are.  Raises OSError, ENOSPC above all: then the chunks
        of this call that were not present before may be absent.
        """
        chunks = range(first_chunk, first_chunk + len(data))
        for chunk, one in zip(chunks, data, strict=True):
            start, stop = chunk_range(chunk, self.size_bytes)
            assert len(one) == stop - start > 0, (chunk, len(one), stop - start)
        with self._write_lock, self._descriptor.in_use() as fd:
            self._descriptor.make_writable(fd)
            states = self._presence.states(chunks)
            for run in _runs([chunks[i] for i, state in enumerate(states) if state == ABSENT]):
                parts = data[run.start - first_chunk : run.stop - first_chunk]
                sums = {chunk: checksum(one) for chunk, one in zip(run, parts, strict=True)}
                pwrite_sparse(fd, run.start * CHUNK_SIZE_BYTES, parts)
                if fd != self._descriptor.number:
                    # Closed after this use: of a failed write-back the kernel tells those who have the file open.
                    os.fdatasync(fd)
                self._presence.set_written(sums)

    def commit(self) -> int:
        """Make what was written durable, data before bit (thread); return how many chunks became so.

        Raises OSError.  If the data could not be synced, these chunks are absent again: the kernel forgets
        which bytes it failed to write and says so only once (fsync(2), "EIO").
        """
        with self._commit_lock, self._descriptor.in_use() as fd:
            written = self._presence.written()
            if not written:
                return 0
            try:
                os.fdatasync(fd)
            except OSError:
                self._presence.fail(written)
                raise
            self._presence.commit(written)
            return len(written)

    def table(self, start: int, stop: int) -> bytes | None:
        """Return the source's bytes `[start, stop)` that `put_table` kept, None if they are not here (thread)."""
        return self._index.table(self.key, start, stop)

    def put_table(self, start: int, data: bytes) -> None:
        """Keep a part of the source that says where its other parts lie (thread).  Raises OSError."""
        self._index.put_table(self.key, start, data)

    def drop(self, chunks: Sequence[int]) -> None:
        """Make chunks absent, durably (thread).  Their bytes stay until written again.  Raises OSError."""
        self._presence.forget(chunks)

    def verify(self, chunks: range | None = None) -> tuple[int, list[int]]:
        """Read what is present of these chunks, or of all, and drop the damaged ones (thread).

        Returns how many were checked and which were damaged.  Raises ChunkUnreadable, once all others were checked,
        or OSError where the index fails.
        """
        checked, damaged = 0, list[int]()
        unreadable = list[int]()
        error: ChunkUnreadable | None = None
        for part in _parts(range(self.chunk_count) if chunks is None else chunks):
            states = self._presence.states(part)
            for run in _runs([part[i] for i, state in enumerate(states) if state != ABSENT]):
                with self._descriptor.in_use() as fd:
                    try:
                        _, bad, absent = self._read_checked(fd, run)
                    except ChunkUnreadable as exc:
                        unreadable, error = unreadable + list(run), exc
                        continue
                self._presence.set_proven(set(run) - set(bad) - set(absent))
                if bad:
                    self._damaged(bad)
                checked, damaged = checked + len(run) - len(absent), damaged + bad
        if error is not None:
            raise ChunkUnreadable(str(error), unreadable) from error.__cause__
        return checked, damaged

    def open(self) -> None:
        """Open the file now (thread).  Raises OSError, ESTALE where it is not what it was or must be."""
        with self._descriptor.in_use():
            return

    def take_idle_descriptor(self) -> int | None:
        """Return the descriptor for the caller to close, if it was not used since this was last asked; else None.

        Call it on the thread of `read_nowait`.  The next use opens the file again; a file with chunks that await
        `commit` keeps it, for the kernel tells of a failed write-back only those who had the file open then.
        """
        return None if self.written_count else self._descriptor.take_idle()

    def close(self) -> None:
        """Close the file once no thread is inside a call; what is not committed is absent when next opened.

        Call it on the thread of `read_nowait`, or when that can no longer be called.  May be called twice.
        """
        self._descriptor.close()
        self._presence.close()

    def _pread_nowait(self, start: int, stop: int) -> memoryview | None:
        part = self._buffer[: stop - start]
        descriptor = self._descriptor
        descriptor.was_used = True
        try:
            count = os.preadv(descriptor.number, (part,), start, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError:
            # EIO, a file system without RWF_NOWAIT, or no descriptor: the thread finds out which.
            return None
        return part if count == stop - start else None

    def _read_unproven_nowait(self, start: int, stop: int, chunks: range) -> memoryview | None:
        """Read chunks that were written and await `commit`, checked each time.

        Their write-back can still fail, and the kernel then may read older bytes from the disk.  A guest
        reads again what was just fetched: 25 µs here instead of 100 for a thread.
        """
        whole_start = chunks.start * CHUNK_SIZE_BYTES
        whole_stop = min(chunks.stop * CHUNK_SIZE_BYTES, self.size_bytes)
        if whole_stop - whole_start > len(self._buffer):
            return None
        sums = [self._presence.written_sum_nowait(chunk) for chunk in chunks]
        if None in sums:
            return None
        data = self._pread_nowait(whole_start, whole_stop)
        if data is None or checksums(data) != sums:
            return None
        return data[start - whole_start : stop - whole_start]

    def _read_proven(self, fd: int, start: int, stop: int) -> tuple[bytes, list[int]]:
        """Return the bytes of proven chunks, and all these chunks as damaged if the file ends before them."""
        data = self._pread(fd, start, stop)
        return data, list(chunks_of(start, stop)) if len(data) != stop - start else []

    def _pread(self, fd: int, start: int, stop: int) -> bytes:
        try:
            return pread_all(fd, start, stop)
        except OSError as exc:
            chunks = chunks_of(start, stop)
            what = f"chunks {chunks.start} to {chunks.stop - 1}"
            raise ChunkUnreadable(f"{self.path}: {what} cannot be read: {exc}", chunks) from exc

    def _read_checked(self, fd: int, chunks: range) -> tuple[bytes, list[int], list[int]]:
        """Return the bytes of whole chunks, which of them are damaged, and which are absent by now."""
        start, stop = chunks.start * CHUNK_SIZE_BYTES, min(chunks.stop * CHUNK_SIZE_BYTES, self.size_bytes)
        expected: Sequence[int | None]
        try:
            expected = self._presence.sums(chunks)
        except OSError:
            # What is proven, or was just written, is known without the index.
            expected = self._presence.sums_nowait(chunks)
            if 0 in expected:
                raise
        data = self._pread(fd, start, stop)
        actual = checksums(data)
        if len(data) < stop - start:
            # The file was cut short: a chunk of which a part is left has no checksum either.
            del actual[len(data) // CHUNK_SIZE_BYTES :]
        actual += [0] * (len(chunks) - len(actual))
        damaged = [
            chunk
            for chunk, want, have in zip(chunks, expected, actual, strict=True)
            if want != 0 and (not have or want not in (None, have))
        ]
        absent = [chunk for chunk, want in zip(chunks, expected, strict=True) if want == 0]
        if absent:
            # Dropped since their state was read, or their page of checksums is spoiled: look again.
            self._presence.unload(absent)
        return data, damaged, absent

    def _absent(self, chunks: list[int]) -> ChunkAbsent:
        return ChunkAbsent(f"{self.path.name}: {len(chunks)} chunks from {chunks[0]} are absent", chunks)

    def _damaged(self, chunks: list[int]) -> ChunkDamaged:
        """Drop damaged chunks and return the error to raise."""
        self.damaged_count += len(chunks)
        try:
            self._presence.forget(chunks)
        except OSError as exc:
            log.warning("%s: cannot record that chunks are damaged: %s", self.path, exc)
        log.warning(
            "%s: %d damaged chunks dropped, from %d; they will be fetched again",
            self.path,
            len(chunks),
            chunks[0],
        )
        return ChunkDamaged(f"{self.path.name}: chunks {chunks} are damaged", chunks)


def _parts(chunks: range) -> Iterator[range]:
    for first in range(chunks.start, chunks.stop, _RUN_CHUNKS):
        yield range(first, min(first + _RUN_CHUNKS, chunks.stop))


def _runs(chunks: Sequence[int]) -> Iterator[range]:
    """Return the runs of neighbours in ascending chunks."""
    start = 0
    for i in range(1, len(chunks) + 1):
        if i == len(chunks) or chunks[i] != chunks[i - 1] + 1:
            yield range(chunks[start], chunks[i - 1] + 1)
            start = i
