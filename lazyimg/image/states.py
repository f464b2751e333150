"""How each image stands, and what is kept durably of that: its use here, and what Glance says of it.

A change that the disk does not take holds all the same, is told the next daemon, and is stored when it can be.

An image's state in the index is one of these; what is present of it is read in all but the first and the last:

    judging ──► active ◄──► gone           its first bytes are awaited ► shown; Glance no longer has it
                   ◄──────► deactivated    Glance has it and refuses its bytes; who needs them waits
                   ◄──────► changed        Glance has other content under its id
                   ├──────► quarantined    what was fetched is not what Glance's hash says; only `evict` ends it
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageChanged, ImageNotFound, ImageQuarantined, LazyImgError
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.lazyimage import LazyImage, SourceHash
from lazyimg.image.pinned import changed_reason, is_other
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index

logger = logging.getLogger(__name__)

JUDGING = "judging"
ACTIVE = "active"
GONE = "gone"
DEACTIVATED = "deactivated"
CHANGED = "changed"
QUARANTINED = "quarantined"
# What is here is all there is, or evidence: never dropped to make room.
KEPT = frozenset({GONE, DEACTIVATED, QUARANTINED})
# An open or a release that follows the last by less than this does not change `last_used` on disk.
USED_INTERVAL_S = 60


def standing(entry: ImageEntry, seen: ImageRecord | LazyImgError) -> tuple[str, str]:
    """Return state and reason of an image, now that Glance answered so when asked for its record.

    seen: an error only where it is final, ImageNotFound or ImageForbidden.
    """
    if entry.state == QUARANTINED:
        return entry.state, entry.reason
    if isinstance(seen, LazyImgError):
        return GONE, f"{seen}; what is here of it is kept and read on"
    if is_other(seen, entry.record):
        return CHANGED, changed_reason(entry.record)
    if seen.status == DEACTIVATED:
        return (
            DEACTIVATED,
            f"image {seen.id}: deactivated in Glance; what is absent comes when it is reactivated",
        )
    if seen.status == ACTIVE:
        return ACTIVE, ""
    return entry.state, entry.reason


def impose(image: LazyImage, state: str, reason: str) -> None:
    """Have an open image behave as its state demands."""
    absent: dict[str, LazyImgError] = {GONE: ImageNotFound(reason), CHANGED: ImageChanged(reason)}
    if image.fetcher.refusal is not None or state in absent:
        image.fetcher.refuse(absent.get(state))
    if image.refusal is not None or state == QUARANTINED:
        image.refuse(ImageQuarantined(reason) if state == QUARANTINED else None)


class States:
    """The index's entries, changed one at a time.

    keep: is given all of them whenever one has changed, before the disk is asked to store it.
    """

    def __init__(
        self,
        index: Index,
        disk: DiskHealth,
        limiter: trio.CapacityLimiter,
        keep: Callable[[list[ImageEntry]], None],
    ) -> None:
        self._keep = keep
        self._index = index
        self._disk = disk
        self._limiter = limiter
        # Changed and not stored yet, at most one an image.
        self._unsaved: dict[str, ImageEntry] = {}
        self._changing = trio.Lock()

    def get(self, key: str) -> ImageEntry | None:
        """Return the entry of this key, or None."""
        stored = self._index.get(key)
        unsaved = self._unsaved.get(key)
        if stored is None or unsaved is None:
            return stored
        # These are the store's own.
        return replace(unsaved, generation=stored.generation, present_count=stored.present_count)

    def all(self) -> list[ImageEntry]:
        """Return all entries."""
        found = (self.get(entry.key) for entry in self._index.entries())
        return [entry for entry in found if entry is not None]

    async def add(self, entry: ImageEntry) -> None:
        """Store a new entry.  Raises OSError."""
        # Not while another is saved: that would be of an image that was dropped since.
        async with self._changing:
            self._unsaved.pop(entry.key, None)
            await self._disk.write(self._index.put, entry, limiter=self._limiter)
            self._keep(self.all())

    async def seen(
        self, entry: ImageEntry, image: LazyImage | None, seen: ImageRecord | LazyImgError
    ) -> ImageEntry:
        """Note what Glance answered when asked for an image's record; return the entry as it is now.

        image: itself if it is open; it behaves so at once, also where the disk cannot note it.
        """
        state, reason = standing(entry, seen)
        record = entry.record
        if isinstance(seen, ImageRecord) and seen.status == ACTIVE and seen.is_same_as(record):
            # Its name and properties may be changed at any time.
            record = seen
        if (state, reason, record) == (entry.state, entry.reason, entry.record):
            return entry
        if image is not None:
            image.record = record
            impose(image, state, reason)
        if state != entry.state:
            is_used = entry.in_use or (image is not None and image.open_handles > 0)
            level = logging.WARNING if is_used and state != ACTIVE else logging.INFO
            logger.log(
                level, "image %s is %s now, it was %s: %s", record.id, state, entry.state, reason or "well"
            )
        # A use that has ended is no use of the other image that has its name now.
        ended = {"in_use": False, "mtime_ns": 0} if state == CHANGED else {}
        await self.mark(entry, state=state, reason=reason, record=record, **ended)
        return self.get(entry.key) or entry

    async def hashed(self, entry: ImageEntry, image: LazyImage, outcome: SourceHash) -> None:
        """Note what came of comparing a whole image with Glance's hash of its source."""
        if outcome == "match":
            # Taken back by the store if a chunk was dropped meanwhile.
            await self.mark(entry, verified=True)
            logger.info("image %s: all of it is here, and is what Glance's hash says", entry.record.id)
        elif outcome == "mismatch":
            reason = (
                f"image {entry.record.id}: what was fetched of it is not what Glance's {entry.record.os_hash_algo} "
                "says; no byte of it is served. Check the image in Glance; `lazyimg evict` has it fetched anew"
            )
            impose(image, QUARANTINED, reason)
            logger.error("image quarantined: %s", reason)
            await self.mark(entry, state=QUARANTINED, reason=reason, verified=False)

    async def used(self, entry: ImageEntry) -> None:
        """Note that the image is used now; its first use gives it its mtime and a place in the listing."""
        now_s = time.time()
        if entry.state == CHANGED:
            return
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
        """Change an entry durably; a failing disk costs its durability until `save`, not the guest.

        One that was dropped meanwhile stays so.
        """
        # One at a time, or a change would be written over by another that began before it.
        async with self._changing:
            now = self.get(entry.key)
            if now is None:
                return
            changed = self._unsaved[entry.key] = change(now)
            self._keep(self.all())
            try:
                await self._save(changed)
            except OSError as exc:
                # A chunk may be dropped before it is stored, which the store alone would know of.
                self._unsaved[entry.key] = replace(changed, verified=False)
                if self._disk.may_write:
                    logger.warning("image %s: its index entry was not stored yet: %s", entry.record.id, exc)

    async def save(self) -> None:
        """Store what could not be stored before, as far as the disk takes it."""
        for key in list(self._unsaved) if self._disk.may_write else ():
            async with self._changing:
                unsaved = self._unsaved.get(key)
                if unsaved is None:
                    continue
                if self._index.get(key) is None:
                    # Dropped meanwhile.
                    del self._unsaved[key]
                    continue
                try:
                    await self._save(unsaved)
                except OSError as exc:
                    logger.debug("entry %s was not stored yet: %s", key, exc)
                    return

    async def _save(self, changed: ImageEntry) -> None:
        await self._disk.write(self._index.put, changed, limiter=self._limiter)
        del self._unsaved[changed.key]
