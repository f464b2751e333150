"""What is kept durably of how each image stands: its use here, and what Glance says of it.

An image's state in the index is one of these:

    judging ──► active ──► gone          its first bytes are awaited; shown; Glance no longer has it
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import trio

from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)

# Its first bytes are still on their way; it has no name yet.
JUDGING = "judging"
# An open or a release that follows the last by less than this does not change `last_used` on disk.
USED_INTERVAL_S = 60


class States:
    """Changes of the index's entries, one at a time."""

    def __init__(self, cache: CacheDir, limiter: trio.CapacityLimiter) -> None:
        self._cache = cache
        self._limiter = limiter
        self._changing = trio.Lock()

    async def used(self, entry: ImageEntry) -> None:
        """Note that the image is used now; its first use gives it its mtime and a place in the listing."""
        now_s = time.time()
        if not entry.in_use:
            # A mtime that is being set at this moment is kept: it is looked at when it is this change's turn.
            await self.change(
                entry,
                lambda now: replace(
                    now, last_used_s=now_s, in_use=True, mtime_ns=now.mtime_ns or int(now_s * 1e9)
                ),
            )
        elif now_s - entry.last_used_s > USED_INTERVAL_S:
            await self.mark(entry, last_used_s=now_s)

    async def mark(self, entry: ImageEntry, **changes: object) -> None:
        """Change fields of an entry; see `change`."""
        await self.change(entry, lambda now: replace(now, **changes))  # type: ignore[arg-type]

    async def change(self, entry: ImageEntry, change: Callable[[ImageEntry], ImageEntry]) -> None:
        """Change an entry durably; a failing disk costs its durability, not the guest."""
        try:
            # One at a time, or a change would be written over by another that began before it.
            async with self._changing:
                current = self._cache.index.get(entry.key) or entry
                await trio.to_thread.run_sync(self._cache.index.put, change(current), limiter=self._limiter)
        except OSError as exc:
            logger.warning("image %s: its index entry was not stored: %s", entry.record.id, exc)
