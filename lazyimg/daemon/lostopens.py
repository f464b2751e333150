"""Takes back handles that were counted of opens which the kernel never got an answer to.

A daemon killed between counting an open and answering it leaves one handle too many: the kernel sends the open once
more, and it is counted once more.  An image would never be dropped then, a deleted file never freed.  But the kernel
keeps a file's inode for as long as it has a handle of it, or a release that was not answered (fuse_prepare_release
in fs/fuse/file.c): what it does not know has no handle, whatever the count says.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from lazyimg.daemon.handles import Handles

logger = logging.getLogger(__name__)


class LostOpens:
    """Finds them among `handles`.

    is_known: asks the kernel for an inode.  take_back: closes so many handles of an inode.
    """

    def __init__(
        self,
        handles: Handles,
        is_known: Callable[[int], Awaitable[bool]],
        take_back: Callable[[int, int], Awaitable[None]],
    ) -> None:
        self._handles = handles
        self._is_known = is_known
        self._take_back = take_back
        # Handles that the kernel has given back and that are still counted, by inode.
        self._releasing: Counter[int] = Counter()
        self._released = trio.Event()
        # Inodes that are looked into, and whether a handle was given back meanwhile.
        self._disturbed: dict[int, bool] = {}

    def release_begins(self, inode: int) -> None:
        """The kernel gives a handle back.  Before it is told that this is done."""
        self._releasing[inode] += 1
        if inode in self._disturbed:
            self._disturbed[inode] = True

    def release_ended(self, inode: int) -> None:
        """The handle is counted no more."""
        self._releasing[inode] -= 1
        if not self._releasing[inode]:
            del self._releasing[inode]
            self._released.set()
            self._released = trio.Event()

    def may_have(self, inode: int) -> bool:
        """True if the kernel, which has just forgotten an inode, seems to have handles of it."""
        return self._handles.count(inode) > 0

    async def look_into_all(self) -> None:
        """Take back what an earlier daemon left."""
        for inode in self._handles.all():
            await self.look_into(inode)

    async def look_into(self, inode: int) -> None:
        """Take all handles of an inode back if the kernel does not know it."""
        if inode in self._disturbed:
            # Whoever is at it asks once more.
            self._disturbed[inode] = True
            return
        try:
            count = await self._lost(inode)
            if count:
                logger.info("inode %d: %d handles that nobody has are taken back", inode, count)
                await self._take_back(inode, count)
        except Exception:
            # They stay counted, which costs room and no guest anything.
            logger.exception("inode %d: handles that nobody has were not taken back", inode)
        finally:
            del self._disturbed[inode]

    async def _lost(self, inode: int) -> int:
        """Return how many handles are counted of what the kernel does not know."""
        self._disturbed[inode] = True
        count = 0
        while self._disturbed[inode]:
            while self._releasing[inode]:
                await self._released.wait()
            self._disturbed[inode] = False
            # Before the kernel is asked: one that is opened afterwards is there.
            count = self._handles.count(inode)
            if not count or await self._is_known(inode):
                count = 0
        return count
