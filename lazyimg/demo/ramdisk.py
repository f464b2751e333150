"""Writes the guest's initramfs: a cpio archive in the "newc" format, gzipped.

The format is the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.  The same content gives
the same bytes, wherever and whenever it is written.
"""

from __future__ import annotations

import gzip
import stat
from collections.abc import Mapping
from pathlib import Path

_TRAILER = "TRAILER!!!"


def write_ramdisk(path: Path, files: Mapping[str, bytes], folders: tuple[str, ...]) -> None:
    """Write an initramfs with these folders and these files, all executable and root's.

    Names are relative to the root; a file's folder must be among `folders`, parents first.
    """
    entries = [_entry(name, stat.S_IFDIR | 0o755, b"", inode) for inode, name in enumerate(folders, 1)]
    entries += [
        _entry(name, stat.S_IFREG | 0o755, content, inode)
        for inode, (name, content) in enumerate(sorted(files.items()), len(folders) + 1)
    ]
    entries.append(_entry(_TRAILER, 0, b"", 0))
    # Level 1: the kernel unpacks it in a slow emulated CPU, and it is read over a network only once.
    path.write_bytes(gzip.compress(b"".join(entries), compresslevel=1, mtime=0))


def _entry(name: str, mode: int, content: bytes, inode: int) -> bytes:
    """Return one entry: "070701", 13 fields of 8 hex digits, name, content; name and content padded to 4.

    The fields: inode, mode, uid, gid, links, mtime, content size, device major and minor, special device
    major and minor, name size with its NUL, checksum (0 in this variant).
    """
    encoded = name.encode() + b"\0"
    fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + encoded
    return _padded(head) + _padded(content)


def _padded(block: bytes) -> bytes:
    return block + b"\0" * (-len(block) % 4)
