"""Attributes as pyfuse3 wants them, of the upper folder's files, of lazy images and of the links to these."""

from __future__ import annotations

import os
import stat

import pyfuse3

from lazyimg.daemon.upper import Found

# The kernel may keep a name and its attributes this long: a real file may take the name, and blocks grow.
ENTRY_TIMEOUT_S = 1
ATTR_TIMEOUT_S = 1
_LINK_MODE = stat.S_IFLNK | 0o777
_BLOCK_BYTES = 512
# The size in which programs that ask (st_blksize) read and write, Python's buffered files among them: the largest that
# libfuse takes in one request.  Nova's download writes 64 KiB at a time; in such requests a copy takes thrice as long.
_PREFERRED_BYTES = 1 << 20


def upper_attributes(found: Found) -> pyfuse3.EntryAttributes:
    """Return a real file's attributes."""
    attributes = _attributes(found.inode, found.attributes.st_mode, found.attributes.st_size)
    for name in ("st_nlink", "st_uid", "st_gid", "st_rdev", "st_blocks"):
        setattr(attributes, name, getattr(found.attributes, name))
    for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
        setattr(attributes, name, getattr(found.attributes, name))
    return attributes


def lazy_attributes(
    inode: int, permissions: int, owner: tuple[int, int], size_bytes: int, present_bytes: int, mtime_ns: int
) -> pyfuse3.EntryAttributes:
    """Return a lazy image's attributes; like a sparse file it has the blocks that are present."""
    attributes = _attributes(inode, stat.S_IFREG | permissions, size_bytes)
    attributes.st_uid, attributes.st_gid = owner
    attributes.st_blocks = -(-present_bytes // _BLOCK_BYTES)
    attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = mtime_ns
    return attributes


def link_attributes(inode: int, target: str) -> pyfuse3.EntryAttributes:
    """Return the attributes of a symbolic link to `target`."""
    return _attributes(inode, _LINK_MODE, len(target))


def statistics_data(found: os.statvfs_result) -> pyfuse3.StatvfsData:
    """Return the sizes of a file system."""
    data = pyfuse3.StatvfsData()
    for name in (
        "f_bsize",
        "f_frsize",
        "f_blocks",
        "f_bfree",
        "f_bavail",
        "f_files",
        "f_ffree",
        "f_favail",
    ):
        setattr(data, name, getattr(found, name))
    data.f_namemax = found.f_namemax
    return data


def _attributes(inode: int, mode: int, size_bytes: int) -> pyfuse3.EntryAttributes:
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = mode
    attributes.st_nlink = 1
    attributes.st_size = size_bytes
    attributes.st_blksize = _PREFERRED_BYTES
    attributes.entry_timeout = ENTRY_TIMEOUT_S
    attributes.attr_timeout = ATTR_TIMEOUT_S
    return attributes
