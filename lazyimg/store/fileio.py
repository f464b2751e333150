"""Reading and writing parts of a sparse file, whole or not at all.  Synchronous; raises OSError."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence

from lazyimg.core.chunks import CHUNK_SIZE_BYTES

Buffer = bytes | bytearray | memoryview

# Linux takes at most 1024 buffers a call (UIO_MAXIOV, uio.h).
_BUFFERS_MAX = 1024
# <linux/falloc.h>
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2
_ZEROS = bytes(CHUNK_SIZE_BYTES)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def pread_all(fd: int, start: int, stop: int) -> bytes:
    """Return the bytes `[start, stop)`, fewer only at the end of the file."""
    data = os.pread(fd, stop - start, start)
    while len(data) < stop - start:
        more = os.pread(fd, stop - start - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def pwrite_sparse(fd: int, start: int, parts: Sequence[Buffer]) -> None:
    """Write chunks one after the other from `start` on; those of zeros become holes, which take no disk.

    What lay there before may be the bytes of a chunk that was dropped, so a hole is made, not assumed.
    """
    first = 0
    while first < len(parts):
        is_hole = parts[first] == _ZEROS
        last = first + 1
        while last < len(parts) and (parts[last] == _ZEROS) == is_hole:
            last += 1
        run = parts[first:last]
        size_bytes = sum(map(len, run))
        if not (is_hole and _punch_hole(fd, start, size_bytes)):
            _pwrite(fd, start, run)
        start += size_bytes
        first = last


def _punch_hole(fd: int, start: int, size_bytes: int) -> bool:
    """Make a hole (fallocate(2)); False where the file system cannot: then zeros are written."""
    return not _libc.fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, start, size_bytes)


def _pwrite(fd: int, start: int, parts: Sequence[Buffer]) -> None:
    """Write all parts one after the other from `start` on."""
    for at in range(0, len(parts), _BUFFERS_MAX):
        views = [memoryview(part) for part in parts[at : at + _BUFFERS_MAX]]
        while views:
            count = os.pwritev(fd, views, start)
            start += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if views:
                views[0] = views[0][count:]
