"""The upper folder's open files: a handle is the file's inode number, so the next daemon understands it.

All handles of a file share one descriptor for reading and one for reading and writing; the kernel keeps to each
handle's mode, appends and direct I/O itself.  What was opened under an earlier daemon is opened again when it is
used.  All methods block, call them in threads, and raise OSError.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from lazyimg.daemon.uppernodes import UpperNodes

_NO_FD = -1


@dataclass(slots=True)
class _File:
    """Descriptors of one file, its handles as far as they are known, and the threads that use it now."""

    read_fd: int = _NO_FD
    write_fd: int = _NO_FD
    handles: int = 0
    users: int = 0

    def fd_for(self, *, writing: bool) -> int:
        return self.write_fd if writing or self.read_fd == _NO_FD else self.read_fd


class UpperFiles:
    """The open files of the upper folder whose inodes are `nodes`."""

    def __init__(self, nodes: UpperNodes) -> None:
        self._nodes = nodes
        self._files: dict[int, _File] = {}
        self._lock = threading.Lock()

    def open(self, inode: int, flags: int, *, by_root: bool) -> None:
        """Count one more handle; of `flags` the way of access and O_TRUNC matter here, the kernel sees to the rest."""
        is_truncated = bool(flags & os.O_TRUNC)
        is_writing = is_truncated or flags & os.O_ACCMODE != os.O_RDONLY
        with self._used(inode, writing=is_writing, by_handle=False) as fd:
            if is_truncated:
                os.ftruncate(fd, 0)
                if not by_root:
                    _drop_set_ids(fd)
            with self._lock:
                self._files[inode].handles += 1

    def created(self, inode: int, fd: int) -> None:
        """Count the handle of a file just created; `fd`, for reading and writing, is ours from here on."""
        with self._lock:
            file = self._files.setdefault(inode, _File())
            file.handles += 1
            if file.write_fd == _NO_FD:
                file.write_fd = fd
                return
        os.close(fd)

    def read(self, inode: int, start: int, size_bytes: int) -> bytes:
        """Return `[start, start + size_bytes)`, less only at the end of the file."""
        with self._used(inode, writing=False, by_handle=True) as fd:
            return os.pread(fd, size_bytes, start)

    def write(self, inode: int, start: int, data: bytes) -> int:
        """Return how many bytes were written."""
        with self._used(inode, writing=True, by_handle=True) as fd:
            return os.pwrite(fd, data, start)

    def truncate(self, inode: int, size_bytes: int) -> None:
        """Make the file this long, whether it is open or not."""
        with self._used(inode, writing=True, by_handle=False) as fd:
            os.ftruncate(fd, size_bytes)

    def sync(self, inode: int, *, data_only: bool) -> None:
        """fsync(2) or fdatasync(2)."""
        with self._used(inode, writing=self.is_written(inode), by_handle=True) as fd:
            if data_only:
                os.fdatasync(fd)
            else:
                os.fsync(fd)

    def is_written(self, inode: int) -> bool:
        """True if the file is open for writing.  Does not block."""
        with self._lock:
            file = self._files.get(inode)
            return file is not None and file.write_fd != _NO_FD

    def flush(self, inode: int) -> None:
        """Let the file system say at close(2) what it did not at write(2), as NFS does."""
        with self._used(inode, writing=True, by_handle=True) as fd:
            os.close(os.dup(fd))

    def release(self, inode: int) -> None:
        """Take back one handle."""
        with self._lock:
            file = self._files.get(inode)
            if file is None:
                return
            file.handles -= 1
            unused = self._taken_if_unused(inode, file)
        _close(unused)

    @contextlib.contextmanager
    def _used(self, inode: int, *, writing: bool, by_handle: bool) -> Iterator[int]:
        """Give a descriptor of the file for the block; in it, it is not closed, whoever releases his handle."""
        with self._lock:
            file = self._files.setdefault(inode, _File())
            file.users += 1
            if by_handle and file.handles <= 0:
                # The handle is of an earlier daemon's time.  How many there are is not known; with the last one
                # known released, the next use of another opens the file once more.
                file.handles = 1
            fd = file.fd_for(writing=writing)
        try:
            yield self._opened(inode, file, writing=writing) if fd == _NO_FD else fd
        finally:
            with self._lock:
                file.users -= 1
                unused = self._taken_if_unused(inode, file)
            _close(unused)

    def _opened(self, inode: int, file: _File, *, writing: bool) -> int:
        # An O_PATH descriptor can be neither read nor written; through /proc the very same file is opened
        # (proc(5), "/proc/pid/fd"), whatever it is called by now.
        with self._nodes.descriptor(inode) as path_fd:
            fd = os.open(f"/proc/self/fd/{path_fd}", (os.O_RDWR if writing else os.O_RDONLY) | os.O_CLOEXEC)
        with self._lock:
            other = file.write_fd if writing else file.read_fd
            if other == _NO_FD and writing:
                file.write_fd = fd
            elif other == _NO_FD:
                file.read_fd = fd
        if other == _NO_FD:
            return fd
        os.close(fd)
        return other

    def _taken_if_unused(self, inode: int, file: _File) -> list[int]:
        """Return the descriptors to close, if no handle and no thread needs them.  The caller holds the lock."""
        if file.handles > 0 or file.users:
            return []
        if self._files.get(inode) is file:
            del self._files[inode]
        return [fd for fd in (file.read_fd, file.write_fd) if fd != _NO_FD]


def _drop_set_ids(fd: int) -> None:
    """Take set-user-ID and set-group-ID away: at every other write the kernel does it, at this one it does not."""
    mode = os.fstat(fd).st_mode
    if mode & (stat.S_ISUID | stat.S_ISGID):
        os.fchmod(fd, stat.S_IMODE(mode) & ~(stat.S_ISUID | stat.S_ISGID))


def _close(fds: list[int]) -> None:
    """Close outside the lock: a close can take as long as freeing a deleted file does."""
    for fd in fds:
        os.close(fd)
