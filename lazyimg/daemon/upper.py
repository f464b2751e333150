"""The real folder beneath the mount: every name that is not a lazy image belongs to it.

It is reached only through descriptors opened before mounting over it (I11), and through O_PATH descriptors of what
was looked up since, so that a rename does not lose a file.  All methods block: call them in threads.  Inode
numbers are the real ones with the highest bit set, so that the next daemon can find them again.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator

ROOT_INODE = 1
# Lazy images have inode numbers below this bit.
INODE_BIT = 1 << 63
# What one walk in search of an inode may look at; Nova's folder has some hundred names.
WALK_ENTRIES_MAX = 100_000
# Taken out of what a caller asks: the daemon reads through its own page cache, and never follows a link.
_FLAGS_DROPPED = os.O_DIRECT | os.O_APPEND


class Upper:
    """The upper folder, through `root_fd`, which stays the caller's."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        # O_PATH descriptors and the kernel's lookup counts, by inode number.
        self._paths: dict[int, int] = {}
        self._lookups: dict[int, int] = {}
        # Readable descriptors and their handles, by inode number: a handle is the inode number.
        self._files: dict[int, int] = {}
        self._handles: dict[int, int] = {}
        self._lock = threading.Lock()

    def lookup(self, parent: int, name: bytes) -> os.stat_result | None:
        """Return the attributes of a name, counted as looked up once more; None if there is none.

        Raises OSError.
        """
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._path(parent))
        except FileNotFoundError:
            return None
        found = os.fstat(fd)
        self._keep(fd, found)
        return found

    def forget(self, inode: int, count: int) -> None:
        """The kernel gives back `count` lookups of an inode."""
        with self._lock:
            left = self._lookups.get(inode, 0) - count
            if left > 0:
                self._lookups[inode] = left
                return
            self._lookups.pop(inode, None)
            fd = self._paths.pop(inode, None)
        if fd is not None:
            os.close(fd)

    def attributes(self, inode: int) -> os.stat_result:
        """Return an inode's attributes.  Raises OSError."""
        return os.fstat(self._path(inode))

    def names(self, inode: int) -> list[bytes]:
        """Return the names in a folder.  Raises OSError."""
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._path(inode))
        try:
            return [os.fsencode(name) for name in os.listdir(fd)]
        finally:
            os.close(fd)

    def target(self, inode: int) -> bytes:
        """Return what a symbolic link points to.  Raises OSError."""
        return os.readlink(b"", dir_fd=self._path(inode))

    def open(self, inode: int, flags: int) -> None:
        """Open a file for reading.  Raises OSError."""
        with self._lock:
            if inode in self._files:
                self._handles[inode] += 1
                return
        # An O_PATH descriptor cannot be read; through /proc the very same file is opened (proc(5), "/proc/pid/fd").
        fd = os.open(f"/proc/self/fd/{self._path(inode)}", (flags & ~_FLAGS_DROPPED) | os.O_CLOEXEC)
        with self._lock:
            if inode in self._files:
                os.close(fd)
            else:
                self._files[inode] = fd
            self._handles[inode] = self._handles.get(inode, 0) + 1

    def read(self, inode: int, start: int, size_bytes: int) -> bytes:
        """Read from an open file; one opened under an earlier daemon is opened again.  Raises OSError."""
        with self._lock:
            fd = self._files.get(inode)
        if fd is None:
            self.open(inode, os.O_RDONLY)
            fd = self._files[inode]
        return os.pread(fd, size_bytes, start)

    def release(self, inode: int) -> None:
        """Close one handle of a file."""
        with self._lock:
            left = self._handles.get(inode, 0) - 1
            if left > 0:
                self._handles[inode] = left
                return
            self._handles.pop(inode, None)
            fd = self._files.pop(inode, None)
        if fd is not None:
            os.close(fd)

    def statistics(self) -> os.statvfs_result:
        """Return the folder's file system's sizes.  Raises OSError."""
        return os.fstatvfs(self._root_fd)

    def _keep(self, fd: int, found: os.stat_result) -> None:
        inode = found.st_ino | INODE_BIT
        with self._lock:
            self._lookups[inode] = self._lookups.get(inode, 0) + 1
            if inode in self._paths:
                os.close(fd)
            else:
                self._paths[inode] = fd

    def _path(self, inode: int) -> int:
        """Return the descriptor of an inode the kernel knows, finding it again after a change of daemon."""
        if inode == ROOT_INODE:
            return self._root_fd
        with self._lock:
            fd = self._paths.get(inode)
        if fd is not None:
            return fd
        for found_fd, found in self._walk():
            if found.st_ino | INODE_BIT == inode:
                self._keep(found_fd, found)
                return self._paths[inode]
            os.close(found_fd)
        raise OSError(errno.ESTALE, "the file is gone")

    def _walk(self) -> Iterator[tuple[int, os.stat_result]]:
        """Yield an O_PATH descriptor, which the caller closes, of each thing below the root."""
        looked_at = 0
        folders = [b"."]
        while folders:
            folder = folders.pop()
            folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root_fd)
            try:
                for entry in os.scandir(folder_fd):
                    looked_at += 1
                    if looked_at > WALK_ENTRIES_MAX:
                        return
                    name = os.fsencode(entry.name)
                    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(os.path.join(folder, name))
                    yield fd, os.fstat(fd)
            finally:
                os.close(folder_fd)
