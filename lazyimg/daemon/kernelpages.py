"""Has the kernel forget what it keeps of an image: bytes that were served must not outlive what was found out since.

Never on the event loop: the kernel waits for a read of such a page that is in flight, and only the loop answers that.
"""

from __future__ import annotations

import logging

import pyfuse3
import trio

logger = logging.getLogger(__name__)

# Images forgotten at once; one waits until its reads in flight are answered, `read_timeout` at most.
THREADS_MAX = 8


class KernelPages:
    """The kernel's page cache of the mount."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        # Inodes whose turn has not come yet.
        self._pending: set[int] = set()

    def forget_nowait(self, inode: int) -> None:
        """Have all pages of an inode forgotten soon."""
        if inode not in self._pending:
            self._pending.add(inode)
            self._nursery.start_soon(self._forget, inode)

    async def _forget(self, inode: int) -> None:
        try:
            async with self._limiter:
                # What is asked from here on is for pages that may come after this began.
                self._pending.discard(inode)
                await trio.to_thread.run_sync(pyfuse3.invalidate_inode, inode, abandon_on_cancel=True)
        except OSError as exc:
            # The kernel does not know the inode (ENOENT): it keeps nothing of it.
            logger.debug("inode %d: nothing to forget: %s", inode, exc)
        except Exception:
            logger.exception("inode %d: the kernel was not told to forget it", inode)
