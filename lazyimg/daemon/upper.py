"""The real folder beneath the mount: every name that is not a lazy image belongs to it.

It is reached only through descriptors opened before mounting over it, and through those of what was looked up
since (I11).  Permissions are not judged here: the kernel has done so for the caller (default_permissions).  All
methods block, call them in threads, and raise OSError.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from lazyimg.daemon import linux
from lazyimg.daemon.fdstore import FdStore
from lazyimg.daemon.handles import Handles
from lazyimg.daemon.upperfiles import UpperFiles
from lazyimg.daemon.uppernodes import INODE_BIT, PATH_FLAGS, ROOT_INODE, Found, UpperNodes, names_in

__all__ = ["INODE_BIT", "ROOT_INODE", "Caller", "Change", "Found", "Upper"]

# What can be made under a name without being opened; devices do not work on this mount (nodev).
_NODE_TYPES = frozenset({stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK})


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a new file belongs to."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Change:
    """Attributes to set; None leaves one as it is."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size_bytes: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


class Upper:
    """The upper folder, through `root_fd`, which stays the caller's.  Opened files are in `files`."""

    def __init__(self, root_fd: int, handles: Handles, store: FdStore) -> None:
        self._root_fd = root_fd
        self._nodes = UpperNodes(root_fd)
        self.files = UpperFiles(self._nodes, handles, store)
        self._owner = os.fstat(root_fd)

    # ── looking ──

    @property
    def owner(self) -> tuple[int, int]:
        """User and group of the folder when its attributes were last asked for.  Does not block."""
        return self._owner.st_uid, self._owner.st_gid

    def lookup(self, parent: int, name: bytes) -> Found | None:
        """Return the file of a name, counted as looked up once more; None if there is none."""
        with self._nodes.descriptor(parent) as folder:
            try:
                fd = os.open(name, PATH_FLAGS, dir_fd=folder)
            except FileNotFoundError:
                return None
        return self._nodes.looked_up(fd)

    def lookup_all(self, parent: int, names: Iterable[bytes]) -> list[Found | None]:
        """Look up several names of one folder."""
        return [self.lookup(parent, name) for name in names]

    def forget(self, forgotten: Iterable[tuple[int, int]]) -> None:
        """The kernel gives back lookups: pairs of inode number and count."""
        for inode, count in forgotten:
            self._nodes.forget(inode, count)

    def attributes(self, inode: int) -> Found:
        """Return an inode's attributes."""
        with self._nodes.descriptor(inode) as fd:
            found = Found(inode, os.fstat(fd))
        if inode == ROOT_INODE:
            self._owner = found.attributes
        return found

    def names(self, inode: int) -> list[bytes]:
        """Return the names in a folder."""
        with self._nodes.descriptor(inode) as fd:
            return names_in(fd)

    def target(self, inode: int) -> bytes:
        """Return what a symbolic link points to."""
        with self._nodes.descriptor(inode) as fd:
            return os.readlink(b"", dir_fd=fd)

    def statistics(self) -> os.statvfs_result:
        """Return the folder's file system's sizes."""
        return os.fstatvfs(self._root_fd)

    # ── making ──

    def create(self, parent: int, name: bytes, mode: int, flags: int, caller: Caller) -> tuple[Found, bool]:
        """Make a file and open it as one handle; also return whether that is a direct one.

        flags: as of open(2), of which the way of access and O_EXCL matter.  A file that somebody else made a moment
        ago is not opened here, since the kernel has not judged it: ESTALE sends the kernel back to look the name up.
        """
        ours = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._nodes.descriptor(parent) as folder:
            try:
                with linux.creating_as(caller.uid, caller.gid):
                    fd = os.open(name, ours, mode, dir_fd=folder)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                raise OSError(errno.ESTALE, "made by somebody else") from None
        try:
            found = self._nodes.looked_up(os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC))
        except OSError:
            os.close(fd)
            raise
        return found, self.files.created(found.inode, fd, flags)

    def make_node(self, parent: int, name: bytes, mode: int, caller: Caller) -> Found:
        """Make a file, a named pipe or a socket without opening it."""
        if stat.S_IFMT(mode) not in _NODE_TYPES:
            raise PermissionError(errno.EPERM, "no device files")
        with self._nodes.descriptor(parent) as folder, linux.creating_as(caller.uid, caller.gid):
            os.mknod(name, mode, dir_fd=folder)
        return self._made(parent, name)

    def make_folder(self, parent: int, name: bytes, mode: int, caller: Caller) -> Found:
        """Make a folder."""
        with self._nodes.descriptor(parent) as folder, linux.creating_as(caller.uid, caller.gid):
            os.mkdir(name, stat.S_IMODE(mode), dir_fd=folder)
        return self._made(parent, name)

    def make_symlink(self, parent: int, name: bytes, target: bytes, caller: Caller) -> Found:
        """Make a symbolic link to `target`."""
        with self._nodes.descriptor(parent) as folder, linux.creating_as(caller.uid, caller.gid):
            os.symlink(target, name, dir_fd=folder)
        return self._made(parent, name)

    def make_link(self, inode: int, parent: int, name: bytes) -> Found:
        """Give a file one more name."""
        with self._nodes.descriptor(inode) as fd, self._nodes.descriptor(parent) as folder:
            os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder, follow_symlinks=True)
        return self._made(parent, name)

    # ── changing ──

    def remove(self, parent: int, name: bytes) -> None:
        """Remove a name that is not a folder's."""
        with self._nodes.descriptor(parent) as folder:
            os.unlink(name, dir_fd=folder)

    def remove_folder(self, parent: int, name: bytes) -> None:
        """Remove an empty folder."""
        with self._nodes.descriptor(parent) as folder:
            os.rmdir(name, dir_fd=folder)

    def rename(self, old_parent: int, old: bytes, new_parent: int, new: bytes, flags: int) -> None:
        """Rename, with renameat2(2)'s RENAME_NOREPLACE or RENAME_EXCHANGE; EINVAL for any other flag."""
        if flags & ~(linux.RENAME_NOREPLACE | linux.RENAME_EXCHANGE):
            raise OSError(errno.EINVAL, "this rename is not known")
        with (
            self._nodes.descriptor(old_parent) as old_folder,
            self._nodes.descriptor(new_parent) as new_folder,
        ):
            linux.rename(old_folder, old, new_folder, new, flags)

    def change(self, inode: int, change: Change) -> Found:
        """Set attributes and return what they all are then."""
        if change.size_bytes is not None:
            self.files.truncate(inode, change.size_bytes)
        with self._nodes.descriptor(inode) as fd:
            path = f"/proc/self/fd/{fd}"
            if change.uid is not None or change.gid is not None:
                os.chown(
                    path, -1 if change.uid is None else change.uid, -1 if change.gid is None else change.gid
                )
            # After the owner, whose change takes set-user-ID and set-group-ID away.
            if change.mode is not None:
                os.chmod(path, stat.S_IMODE(change.mode))
            if change.atime_ns is not None or change.mtime_ns is not None:
                linux.set_times(path, change.atime_ns, change.mtime_ns)
        return self.attributes(inode)

    def sync_folder(self, inode: int, *, data_only: bool) -> None:
        """Make a folder's names durable."""
        with self._nodes.descriptor(inode) as path_fd:
            fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=path_fd)
        try:
            (os.fdatasync if data_only else os.fsync)(fd)
        finally:
            os.close(fd)

    def _made(self, parent: int, name: bytes) -> Found:
        found = self.lookup(parent, name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "removed as soon as it was made")
        return found
