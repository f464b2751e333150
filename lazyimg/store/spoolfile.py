"""A file without a name that a source is kept in while it is decoded.

It goes with the process that made it, so that none is ever left behind or taken for another's.  Guards I1: what is
read is what was given, or an error; a disk may lose what was written to it and say nothing.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lazyimg.store.checksum import checksums
from lazyimg.store.folder import PrivateFolder

# What one checksum is of: as of a chunk, 8 bytes of memory for each.
BLOCK_BYTES = 64 << 10


class SpoolFile:
    """One source's bytes from its first on, as far as they have come.  Methods block and raise OSError.

    Whole blocks are in the file, and their checksums in memory; the part of a block at the end is in memory alone.
    size_bytes: how far they have come.  is_closed: nothing can be read or appended any more.
    """

    def __init__(self, folder: Path, algo: str | None) -> None:
        """Make it.  algo: of the hash to compute of what is appended."""
        # O_TMPFILE, or unlinked at once where the file system has no such thing: then a name that a crash leaves is
        # removed at the next start, as one that the index does not know.
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            self._fd = os.dup(file.fileno())
        self.size_bytes = 0
        self.is_closed = False
        self._digest = None if algo is None else hashlib.new(algo, usedforsecurity=False)
        self._sums = array("Q")
        self._tail = b""
        # Held while something is appended.
        self._appending_lock = threading.Lock()
        # Threads that use the descriptor; of a file that is closed the last of them closes that too.
        self._users = 0
        self._users_lock = threading.Lock()

    def append(self, start: int, data: bytes) -> None:
        """Take the source's bytes from `start` on, of which some may be here already; none or all of them."""
        with self._in_use() as fd, self._appending_lock:
            assert start <= self.size_bytes
            fresh = data[self.size_bytes - start :]
            pending = memoryview(self._tail + fresh)
            whole_bytes = len(pending) // BLOCK_BYTES * BLOCK_BYTES
            _write(fd, len(self._sums) * BLOCK_BYTES, pending[:whole_bytes])
            self._sums.extend(checksums(pending[:whole_bytes]))
            self._tail = bytes(pending[whole_bytes:])
            if self._digest is not None:
                self._digest.update(fresh)
            # Last: who sees it, without the lock, may read so far.
            self.size_bytes += len(fresh)

    def read(self, start: int, stop: int) -> bytes:
        """Return `[start, stop)`, which has come.  EBADMSG where the disk gives back something else."""
        with self._in_use() as fd:
            with self._appending_lock:
                whole_count, tail = len(self._sums), self._tail
            first, last = start // BLOCK_BYTES, min(-(-stop // BLOCK_BYTES), whole_count)
            data = b""
            if first < last:
                data = os.pread(fd, (last - first) * BLOCK_BYTES, first * BLOCK_BYTES)
                if checksums(data) != self._sums[first:last].tolist():
                    raise OSError(errno.EBADMSG, "a spool is not what was written to it")
            if stop > whole_count * BLOCK_BYTES:
                data += tail
            at = start - first * BLOCK_BYTES
            return data[at : at + stop - start]

    def hexdigest(self) -> str | None:
        """Return the hash of what has come, None where no algorithm was given."""
        return None if self._digest is None else self._digest.hexdigest()

    def allocated_bytes(self) -> int:
        """Return what it takes on disk."""
        try:
            with self._in_use() as fd:
                return os.fstat(fd).st_blocks * 512
        except OSError:
            # Closed by now; what cannot be asked is measured again soon.
            return 0

    def close(self) -> None:
        """Give up its room, once no thread uses it.  May be called twice."""
        with self._users_lock:
            is_last = not self.is_closed and not self._users
            self.is_closed = True
        if is_last:
            os.close(self._fd)

    @contextmanager
    def _in_use(self) -> Iterator[int]:
        """Give the descriptor, which stays open in the block.  Raises EBADF once it is closed."""
        with self._users_lock:
            if self.is_closed:
                raise OSError(errno.EBADF, "the spool was closed")
            self._users += 1
        try:
            yield self._fd
        finally:
            with self._users_lock:
                self._users -= 1
                is_last = self.is_closed and not self._users
            if is_last:
                os.close(self._fd)


class Spools:
    """The spool files of a cache, at most one of each image.  All methods are for threads."""

    def __init__(self, folder: PrivateFolder) -> None:
        # The folder itself, whatever its path leads to by now.
        self._folder = Path(f"/proc/self/fd/{folder.fd}")
        self._files: dict[str, SpoolFile] = {}

    def open(self, key: str, algo: str | None) -> SpoolFile:
        """Return a new file for an image's source, which counts as the image's until it is closed.  Raises OSError.

        algo: as of SpoolFile.
        """
        self.close(key)
        file = self._files[key] = SpoolFile(self._folder, algo)
        return file

    def close(self, key: str) -> None:
        """Close the file of an image, if it has one."""
        file = self._files.pop(key, None)
        if file is not None:
            file.close()

    def close_all(self) -> None:
        for key in list(self._files):
            self.close(key)

    def allocated_bytes(self, key: str) -> int:
        """Return what an image's file takes on disk, 0 without one."""
        file = self._files.get(key)
        return 0 if file is None else file.allocated_bytes()


def _write(fd: int, at: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(fd, data, at)
        data, at = data[written:], at + written
