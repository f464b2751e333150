"""What the kernel knows of the upper folder: inode numbers, and a descriptor for each.

An inode number is a hash of the file's handle with the highest bit set: the next daemon finds the file again by
looking at all there are, and a number is never given to another file, however often the disk reuses its own.
All methods block: call them in threads.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import stat
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from lazyimg.daemon.linux import file_handle

ROOT_INODE = 1
# Lazy images have inode numbers below this bit.
INODE_BIT = 1 << 63
# What one walk in search of an inode may look at; Nova's folder has some hundred names.
WALK_ENTRIES_MAX = 100_000
# A descriptor that stands for a name's file, of whatever kind, and needs no permission on it.
PATH_FLAGS = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the upper folder, as the kernel shall know it."""

    inode: int
    attributes: os.stat_result


@dataclass(slots=True)
class _Node:
    """An O_PATH descriptor, the kernel's count of lookups, and how many threads use the descriptor now."""

    fd: int
    lookups: int = 0
    users: int = 0


class UpperNodes:
    """The files of the upper folder that the kernel knows, by inode number; `root_fd` stays the caller's."""

    def __init__(self, root_fd: int) -> None:
        self._root_fd = root_fd
        self._nodes: dict[int, _Node] = {}
        self._lock = threading.Lock()

    def looked_up(self, fd: int) -> Found:
        """Count one more lookup of the file of an O_PATH descriptor, which is ours from here on."""
        found = _found(fd)
        self._keep(fd, found.inode)
        return found

    def take_over(self, inode: int, fd: int) -> None:
        """Know an inode by a descriptor of its file, until `give_back`, whether or not it has a name."""
        path_fd = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
        with self._lock:
            # How often the kernel looked it up is not known; its next `forget` is for all of them.
            self._nodes[inode] = _Node(path_fd, lookups=1, users=1)

    def give_back(self, inode: int) -> None:
        """End what `take_over` began."""
        self._used(inode, self._nodes[inode])

    def forget(self, inode: int, count: int) -> None:
        """The kernel gives back `count` lookups of an inode."""
        with self._lock:
            node = self._nodes.get(inode)
            if node is None:
                return
            node.lookups -= count
            is_unused = self._is_taken_if_unused(inode, node)
        if is_unused:
            os.close(node.fd)

    @contextlib.contextmanager
    def descriptor(self, inode: int) -> Iterator[int]:
        """Give the O_PATH descriptor of an inode for the block; in it, it is not closed.

        Raises OSError with ESTALE if the file is gone.
        """
        if inode == ROOT_INODE:
            yield self._root_fd
            return
        node = self._use(inode)
        try:
            yield node.fd
        finally:
            self._used(inode, node)

    def _use(self, inode: int) -> _Node:
        for _ in range(2):
            with self._lock:
                node = self._nodes.get(inode)
                if node is not None:
                    node.users += 1
                    return node
            self._find_again(inode)
        raise OSError(errno.ESTALE, "the file was forgotten while it was looked for")

    def _used(self, inode: int, node: _Node) -> None:
        with self._lock:
            node.users -= 1
            is_unused = self._is_taken_if_unused(inode, node)
        if is_unused:
            os.close(node.fd)

    def _keep(self, fd: int, inode: int) -> None:
        with self._lock:
            node = self._nodes.get(inode)
            if node is None:
                self._nodes[inode] = _Node(fd, lookups=1)
                return
            node.lookups += 1
        os.close(fd)

    def _is_taken_if_unused(self, inode: int, node: _Node) -> bool:
        """True if neither the kernel nor a thread needs the descriptor: the caller, who holds the lock, closes it.

        Outside the lock: closing the last descriptor of a deleted file takes as long as freeing it does.
        """
        if node.lookups > 0 or node.users or self._nodes.get(inode) is not node:
            return False
        del self._nodes[inode]
        return True

    def _find_again(self, inode: int) -> None:
        """Find an inode that an earlier daemon told the kernel.  Raises OSError with ESTALE if it is gone."""
        # Twice: a walk can miss what is renamed while it goes on.
        for fd, found in itertools.chain(self._walk(), self._walk()):
            if found.inode == inode:
                # How often the kernel looked it up is not known; its next `forget` is for all of them.
                self._keep(fd, inode)
                return
            os.close(fd)
        raise OSError(errno.ESTALE, "the file is gone")

    def _walk(self) -> Iterator[tuple[int, Found]]:
        """Yield an O_PATH descriptor, which the caller closes, of each thing below the root."""
        looked_at = 0
        folders = [b"."]
        while folders:
            folder = folders.pop()
            # What goes away meanwhile is not what is looked for.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                for name in names_in(self._root_fd, folder):
                    looked_at += 1
                    if looked_at > WALK_ENTRIES_MAX:
                        return
                    path = os.path.join(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        fd = os.open(path, PATH_FLAGS, dir_fd=self._root_fd)
                        found = _found(fd)
                        if stat.S_ISDIR(found.attributes.st_mode):
                            folders.append(path)
                        yield fd, found


def names_in(folder_fd: int, path: bytes = b".") -> list[bytes]:
    """Return the names in a folder, without "." and "..".  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder_fd)
    try:
        return [os.fsencode(name) for name in os.listdir(fd)]
    finally:
        os.close(fd)


def _found(fd: int) -> Found:
    attributes = os.fstat(fd)
    identity = b"%d %d " % (attributes.st_dev, attributes.st_ino) + file_handle(fd)
    number = int.from_bytes(hashlib.blake2b(identity, digest_size=8).digest())
    return Found(number | INODE_BIT, attributes)
