"""The upper folder's open files: a handle is the file's inode number, so the next daemon understands it.

All handles of a file share one descriptor for reading and one for reading and writing; the kernel keeps to each
handle's mode, appends and direct I/O itself.  Both are stored outside this process before an open is answered, and
taken over from there by the next daemon, so that a file without a name goes on.  All methods block, call them in
threads, and raise OSError.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from lazyimg.daemon import linux
from lazyimg.daemon.fdstore import FdStore, StoredFile
from lazyimg.daemon.handles import Handles
from lazyimg.daemon.uppernodes import UpperNodes

_NO_FD = -1
# Sequential writes are written out in runs of this: long enough for a disk, and the copies of a download, each the
# work of two processes, and the disk's work then overlap.
WRITE_OUT_BYTES = 8 << 20
_SET_IDS = stat.S_ISUID | stat.S_ISGID
# From Linux 6.6 on what a direct handle writes is thrown out of the page cache (fuse_direct_io in fs/fuse/file.c);
# before, another handle of the file would go on reading what was there.
DIRECT_KERNEL_MIN = (6, 6)
IS_DIRECT_COHERENT = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= DIRECT_KERNEL_MIN


@dataclass(slots=True)
class _File:
    """Descriptors of one file, the names of those that are stored, and how many threads use it now.

    is_taken_over: its inode is kept known for as long as it is open, since it may have no name to find it by.
    may_be_direct: one of its handles is direct, or was opened under an earlier daemon and may be so.
    run_start, run_stop: what was written from end to end, and the kernel was not told to write out.
    """

    read_fd: int = _NO_FD
    write_fd: int = _NO_FD
    names: dict[int, str] = field(default_factory=dict)
    users: int = 0
    is_taken_over: bool = False
    may_be_direct: bool = False
    run_start: int = 0
    run_stop: int = 0

    def fd_for(self, *, writing: bool) -> int:
        return self.write_fd if writing or self.read_fd == _NO_FD else self.read_fd


class UpperFiles:
    """The open files of the upper folder whose inodes are `nodes`."""

    def __init__(self, nodes: UpperNodes, handles: Handles, store: FdStore) -> None:
        self._nodes = nodes
        self._handles = handles
        self._store = store
        self._files: dict[int, _File] = {}
        self._lock = threading.Lock()

    def take_over(self, stored: Iterable[StoredFile]) -> None:
        """Go on with what the last daemon had stored.  Before anything else is asked."""
        for one in stored:
            file = self._files.setdefault(one.inode, _File())
            if (
                not self._handles.count(one.inode)
                or (file.write_fd if one.is_writing else file.read_fd) != _NO_FD
            ):
                # Of an open or a release that was cut short.
                self._store.remove(one.name)
                os.close(one.fd)
                continue
            if one.is_writing:
                file.write_fd = one.fd
            else:
                file.read_fd = one.fd
            file.names[one.fd] = one.name
        for inode, file in list(self._files.items()):
            if file.names:
                self._nodes.take_over(inode, next(iter(file.names)))
                file.is_taken_over = file.may_be_direct = True
            else:
                del self._files[inode]

    def open(self, inode: int, flags: int, *, by_root: bool) -> bool:
        """Count one more handle; True if it is a direct one.

        Of `flags` the way of access and O_TRUNC matter here, the kernel sees to the rest.
        """
        is_truncated = bool(flags & os.O_TRUNC)
        is_writing = is_truncated or flags & os.O_ACCMODE != os.O_RDONLY
        with self._used(inode, writing=is_writing) as fd:
            if is_truncated:
                os.ftruncate(fd, 0)
                if not by_root:
                    _drop_set_ids(fd)
            is_direct = _may_open_direct(fd, flags)
            with self._lock:
                self._files[inode].may_be_direct |= is_direct
            self._stored(inode, fd, is_writing=is_writing)
            self._handles.opened(inode)
            return is_direct

    def created(self, inode: int, fd: int, flags: int) -> bool:
        """Count the handle of a file just created; True if it is a direct one.

        `fd`, for reading and writing, is ours from here on.
        """
        with self._lock:
            file = self._files.setdefault(inode, _File())
            is_first = file.write_fd == _NO_FD
            if is_first:
                file.write_fd = fd
        if not is_first:
            os.close(fd)
        return self.open(inode, flags & os.O_ACCMODE, by_root=False)

    def read(self, inode: int, start: int, size_bytes: int) -> bytes:
        """Return `[start, start + size_bytes)`, less only at the end of the file."""
        with self._used(inode, writing=False) as fd:
            return os.pread(fd, size_bytes, start)

    def write(self, inode: int, start: int, data: bytes) -> int:
        """Return how many bytes were written."""
        with self._used(inode, writing=True) as fd:
            file = self._files[inode]
            if file.may_be_direct:
                _drop_set_ids(fd)
            written_bytes = os.pwrite(fd, data, start)
            self._write_out(file, fd, start, start + written_bytes)
            return written_bytes

    def truncate(self, inode: int, size_bytes: int) -> None:
        """Make the file this long, whether it is open or not."""
        with self._used(inode, writing=True) as fd:
            os.ftruncate(fd, size_bytes)

    def sync(self, inode: int, *, data_only: bool) -> None:
        """fsync(2) or fdatasync(2)."""
        with self._used(inode, writing=self.is_written(inode)) as fd:
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
        with self._used(inode, writing=True) as fd:
            os.close(os.dup(fd))

    def release(self, inode: int, count: int = 1) -> None:
        """Take back so many handles."""
        with self._lock:
            self._handles.closed(inode, count)
            file = self._files.get(inode)
            unused = None if file is None else self._taken_if_unused(inode, file)
        self._close(inode, unused)

    def _stored(self, inode: int, fd: int, *, is_writing: bool) -> None:
        """Store a descriptor of a file that is in use, if it is not stored yet."""
        file = self._files[inode]
        if fd in file.names:
            return
        name = self._store.put(inode, fd, is_writing=is_writing)
        with self._lock:
            is_first = file.names.setdefault(fd, name) == name
        if not is_first:
            self._store.remove(name)

    def _write_out(self, file: _File, fd: int, start: int, stop: int) -> None:
        """Note what was written, and have a long run of it go to disk now rather than at the fsync that will follow.

        Several threads may be here for one file: what they make of the run is a hint, and does no harm.
        """
        file.run_start = file.run_start if start == file.run_stop else start
        file.run_stop = stop
        if stop - file.run_start >= WRITE_OUT_BYTES:
            run_start, file.run_start = file.run_start, stop
            # What cannot be written out is told by fsync, or there is no disk behind (tmpfs).
            with contextlib.suppress(OSError):
                linux.begin_writing_out(fd, run_start, stop)

    @contextlib.contextmanager
    def _used(self, inode: int, *, writing: bool) -> Iterator[int]:
        """Give a descriptor of the file for the block; in it, it is not closed, whoever releases his handle."""
        with self._lock:
            file = self._files.get(inode)
            if file is None:
                file = self._files[inode] = _File(may_be_direct=self._handles.count(inode) > 0)
            file.users += 1
            fd = file.fd_for(writing=writing)
        try:
            yield self._opened(inode, file, writing=writing) if fd == _NO_FD else fd
        finally:
            with self._lock:
                file.users -= 1
                unused = self._taken_if_unused(inode, file)
            self._close(inode, unused)

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

    def _taken_if_unused(self, inode: int, file: _File) -> _File | None:
        """Return the file to close, if no handle and no thread needs it.  The caller holds the lock."""
        if file.users or self._handles.count(inode):
            return None
        if self._files.get(inode) is file:
            del self._files[inode]
            return file
        return None

    def _close(self, inode: int, file: _File | None) -> None:
        """Close outside the lock: a close can take as long as freeing a deleted file does."""
        if file is None:
            return
        for name in file.names.values():
            self._store.remove(name)
        for fd in (file.read_fd, file.write_fd):
            if fd != _NO_FD:
                os.close(fd)
        if file.is_taken_over:
            self._nodes.give_back(inode)


def _may_open_direct(fd: int, flags: int) -> bool:
    """True if a new handle that only writes shall go past the kernel's page cache (FOPEN_DIRECT_IO).

    It saves one of the copies a write takes.  The kernel leaves set-user-ID and set-group-ID to us then, so a file
    that has them is written the other way; they may still come while the handle is open.
    """
    is_write_only = flags & os.O_ACCMODE == os.O_WRONLY
    return is_write_only and IS_DIRECT_COHERENT and not os.fstat(fd).st_mode & _SET_IDS


def _drop_set_ids(fd: int) -> None:
    """Take set-user-ID and set-group-ID away, where the kernel does not: at O_TRUNC, and for a direct handle.

    The kernel has locked the inode meanwhile, against a chmod too.
    """
    mode = os.fstat(fd).st_mode
    if mode & _SET_IDS:
        os.fchmod(fd, stat.S_IMODE(mode) & ~_SET_IDS)
