"""Has the buffer of a request in memory before the kernel copies a request into it.

A daemon may be killed while the kernel copies.  A page of the buffer that has yet to be faulted in is then refused to
it, as to any process that is being killed, and the kernel fails that request with EIO (fuse_dev_do_read in
fs/fuse/dev.c): it is not one that the next daemon is sent again.  The same holds for what is answered from memory that
nobody ever touched.  Tried on Linux 6.18 with writes of 1 MiB: of 2,000 kills, with a buffer fresh from the kernel at
each request, 1,237 failed a write; with the same buffer in memory, none.

The buffer is libfuse's: each task of pyfuse3's session loop has one allocated at its first request.  What is freed just
before that, of the same size, the allocator gives again.
"""

from __future__ import annotations

import ctypes
import logging
import weakref

import trio

logger = logging.getLogger(__name__)

# libfuse's: FUSE_MAX_MAX_PAGES pages, and FUSE_BUFFER_HEADER_SIZE.
BUFFER_BYTES = (256 << 12) + 4096
# What precedes the bytes of a write; and all of any other request: two names of 255 bytes, or one and a link's target
# of 4095, are the largest.
HEADERS_BYTES = 5 << 10
# So many tasks have room in memory for a write of the largest size, 8 MiB in all; those beyond have it for any
# other request: a write that comes while so many requests wait can be failed by a kill.
WHOLE_MAX = 32

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3

# Keeps the interpreter's lock, so that no other thread of Python's allocates meanwhile.
_libc = ctypes.PyDLL(None)


class RequestBuffers:
    """Those of one session loop.  write_bytes_max: the largest write that the kernel sends."""

    def __init__(self, write_bytes_max: int) -> None:
        self._whole_bytes = min(write_bytes_max + HEADERS_BYTES, BUFFER_BYTES)
        self._tasks: weakref.WeakSet[trio.lowlevel.Task] = weakref.WeakSet()
        self._can_prepare = hasattr(_libc, "mallopt")
        if not self._can_prepare:
            logger.info("this C library is not glibc; a killed daemon may fail a request that it was taking")
            return
        _libc.malloc.restype = ctypes.c_void_p
        _libc.malloc.argtypes = (ctypes.c_size_t,)
        _libc.free.argtypes = (ctypes.c_void_p,)
        # Buffers come from the heap and a freed one stays in it: a mapping of its own would be fresh each time.  About
        # what the allocator comes to by itself once it has seen what the network brings.
        _libc.mallopt(_M_MMAP_THRESHOLD, 8 * BUFFER_BYTES)
        _libc.mallopt(_M_TRIM_THRESHOLD, 4 * BUFFER_BYTES)
        _libc.mallopt(_M_TOP_PAD, 2 * BUFFER_BYTES)

    def prepare(self) -> None:
        """Have the running task's buffer in memory.  To be called right before each of its requests is taken."""
        task = trio.lowlevel.current_task()
        if task in self._tasks or not self._can_prepare:
            return
        self._tasks.add(task)
        touch_next_buffer(self._whole_bytes if len(self._tasks) <= WHOLE_MAX else HEADERS_BYTES)


def touch_next_buffer(size_bytes: int) -> None:
    """Write to the first bytes of what the next malloc(BUFFER_BYTES) of this thread will return."""
    address = _libc.malloc(BUFFER_BYTES)
    if address:
        ctypes.memset(address, 0, size_bytes)
        _libc.free(address)
