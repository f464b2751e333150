"""The descriptor of one file: it can be taken away when idle, and comes back with the next use.

Threads use the file between `in_use`'s begin and end; the event loop uses `number` without asking, and so is the only
one to take it away: the kernel gives a closed number to the next file at once.  Guards I5: where too many files have
one, a thread opens one for each use and closes it after.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lazyimg.store.folder import PrivateFolder

# Half of what a process is usually given.
FILES_MAX = 512


class DescriptorLimit:
    """How many files may keep their descriptors."""

    def __init__(self, files_max: int = FILES_MAX) -> None:
        self._files_max = files_max
        self._count = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Let one more file keep its descriptor; False if there are too many."""
        with self._lock:
            if self._count >= self._files_max:
                return False
            self._count += 1
            return True

    def give_back(self) -> None:
        """A file has none any more."""
        with self._lock:
            self._count -= 1


class Descriptor:
    """A file of this many bytes that is ours alone; it is opened when it is first used.

    number: the descriptor that it keeps, -1 while there is none.  was_used: true if it was used since `take_idle` last
    looked.
    """

    def __init__(self, folder: PrivateFolder, name: str, size_bytes: int, limit: DescriptorLimit) -> None:
        self.number = -1
        self.was_used = True
        self._folder = folder
        self._name = name
        self._size_bytes = size_bytes
        self._limit = limit
        # Device and inode of what was opened first: nothing else that appears under its name is read.
        self._identity: tuple[int, int] | None = None
        # Held while the file is opened, which may take as long as the disk likes.
        self._opening_lock = threading.Lock()
        # Threads inside `in_use`; of a file that is closed the last of them closes the descriptor.
        self._users = 0
        self._is_closed = False
        self._users_lock = threading.Lock()

    @contextmanager
    def in_use(self) -> Iterator[int]:
        """Give a descriptor, which stays open in the block: `number`, or one for this block alone (thread).

        It can be read; `make_writable` says whether it can be written.  Raises OSError: EBADF once it is closed for
        good, ESTALE if the file is not what it was or must be.
        """
        with self._users_lock:
            if self._is_closed:
                raise OSError(errno.EBADF, f"{self._folder.path / self._name}: closed")
            self._users += 1
        try:
            self.was_used = True
            if self.number >= 0 or self._keep():
                yield self.number
            else:
                own = self._open()
                try:
                    yield own
                finally:
                    os.close(own)
        finally:
            with self._users_lock:
                self._users -= 1
                if self._is_closed and not self._users:
                    self._close()

    def make_writable(self, fd: int) -> None:
        """Open for writing, under the same number, what could only be opened for reading (thread, in use).

        Raises OSError, EROFS where it still cannot.
        """
        with self._opening_lock:
            if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                return
            writable = self._open_as(os.O_RDWR)
            try:
                # Whoever reads by this number meanwhile reads the one or the other, which are the same file.
                os.dup2(writable, fd, inheritable=False)
            finally:
                os.close(writable)

    def take_idle(self) -> int | None:
        """Return the descriptor for the caller to close, if nobody used it since this was last asked; else None."""
        was_used, self.was_used = self.was_used, False
        with self._users_lock:
            if was_used or self.number < 0 or self._users or self._is_closed:
                return None
            return self._let_go()

    def close(self) -> None:
        """Close it for good, once no thread uses it.  May be called twice."""
        with self._users_lock:
            is_last = not self._is_closed and not self._users
            self._is_closed = True
            if is_last:
                self._close()

    def _keep(self) -> bool:
        """Open the file and keep it so, unless too many are."""
        with self._opening_lock:
            if self.number < 0:
                if not self._limit.take():
                    return False
                try:
                    self.number = self._open()
                except BaseException:
                    self._limit.give_back()
                    raise
            return True

    def _open(self) -> int:
        try:
            return self._open_as(os.O_RDWR)
        except OSError as exc:
            if exc.errno != errno.EROFS:
                raise
            return self._open_as(os.O_RDONLY)

    def _open_as(self, access: int) -> int:
        # Without O_NOATIME a read that need not wait for the disk could still wait for its inode's time.
        fd = self._folder.open_file(self._name, access | os.O_NOATIME)
        found = os.fstat(fd)
        identity = found.st_dev, found.st_ino
        if found.st_size != self._size_bytes or self._identity not in (None, identity):
            os.close(fd)
            raise OSError(errno.ESTALE, f"{self._folder.path / self._name}: not the file it was")
        self._identity = identity
        return fd

    def _close(self) -> None:
        if self.number >= 0:
            os.close(self._let_go())

    def _let_go(self) -> int:
        number, self.number = self.number, -1
        self._limit.give_back()
        return number
