"""Has the kernel forget what it keeps of an image: bytes that were served must not outlive what was found out since.

The kernel is told only that it no longer knows the attributes, and is then shown another mtime, by a nanosecond: the
next process that reads through the page cache drops the pages itself (fuse.h, FUSE_AUTO_INVAL_DATA).  To have the
pages dropped at once (pyfuse3.invalidate_inode) would wait, in the kernel, for each read of them in flight.  A daemon
killed in that wait never ended, since only its successor could have answered those reads, and it held the cache's
lock: the mount hung for ever.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter
from functools import partial

import pyfuse3
import trio

logger = logging.getLogger(__name__)


class KernelPages:
    """The kernel's page cache of the mount."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        # How often the pages of an inode were to be forgotten; no more inodes than images.
        self._times: Counter[int] = Counter()
        # Inodes of which the kernel is yet to be told.
        self._pending: set[int] = set()

    def forget_nowait(self, inode: int) -> None:
        """Have all pages of an inode forgotten before they are read again."""
        self._times[inode] += 1
        if inode not in self._pending:
            self._pending.add(inode)
            self._nursery.start_soon(self._forget, inode)

    def mtime_shift_ns(self, inode: int) -> int:
        """Return what to add to the mtime that is shown of an inode."""
        return self._times[inode]

    async def _forget(self, inode: int) -> None:
        # What is asked from here on may come too late for this time.
        self._pending.discard(inode)
        try:
            await _forget_attributes(inode)
        except OSError as exc:
            # The kernel does not know the inode (ENOENT): it keeps nothing of it.
            logger.debug("inode %d: nothing to forget: %s", inode, exc)
        except Exception:
            logger.exception("inode %d: the kernel was not told to forget it", inode)


async def is_known(inode: int) -> bool:
    """True if the kernel knows an inode, or will not say."""
    try:
        await _forget_attributes(inode)
    except OSError as exc:
        return exc.errno != errno.ENOENT
    return True


async def _forget_attributes(inode: int) -> None:
    """Raises OSError, with ENOENT where the kernel does not know the inode."""
    # Not on the event loop: a write to /dev/fuse takes locks of the connection.
    tell = partial(pyfuse3.invalidate_inode, inode, attr_only=True)
    await trio.to_thread.run_sync(tell, abandon_on_cancel=True)
