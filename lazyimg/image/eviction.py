"""Drops images from the cache, for an operator, to make room, or since nobody uses them any more.

Guards I7: an image that is open, or that Glance no longer has, stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageForbidden, ImageNotFound, ImageRefused, LazyImgError
from lazyimg.image.listing import Records
from lazyimg.image.openimages import OpenImages
from lazyimg.image.states import KEPT, QUARANTINED, States
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)


class Eviction:
    """What may be dropped, and its dropping."""

    def __init__(
        self,
        glance: Records,
        states: States,
        opened: OpenImages,
        forget: Callable[[ImageEntry], None],
    ) -> None:
        """forget: takes away what an image is found by."""
        self._glance = glance
        self._states = states
        self._opened = opened
        self._forget = forget

    def busy_keys(self) -> set[str]:
        """Return the images that must not be dropped now: open, being fetched, or all that is left of them."""
        kept = {entry.key for entry in self._states.all() if entry.state in KEPT}
        return self._opened.busy_keys() | kept

    async def evict(self, key: str) -> int:
        """Drop an image's chunks; return the bytes freed.

        Raises InUse where it is open, ImageRefused where Glance no longer has it or gives it out, GlanceUnavailable
        where that cannot be found out.  What is quarantined is of no use to anybody and always goes.
        """
        entry = self._states.get(key)
        if entry is None:
            return 0
        image_id = entry.record.id
        if entry.state != QUARANTINED:
            await self._check_replaceable(entry)
        freed_bytes = await self._opened.remove(entry.record, key, lambda: self._forget(entry))
        logger.info("image %s: dropped from the cache, %d bytes freed", image_id, freed_bytes)
        return freed_bytes

    async def try_evict(self, key: str) -> bool:
        """Drop an image to make room; False if it may not be dropped after all."""
        try:
            await self.evict(key)
        except LazyImgError as exc:
            logger.info("not dropped: %s", exc)
            return False
        except OSError as exc:
            logger.warning("image of key %s: not dropped: %s", key, exc)
            return False
        return True

    async def drop_unused(self, key: str) -> None:
        """Drop an image whose use here has ended, unless it has begun again."""
        entry = self._states.get(key)
        if entry is not None and not entry.in_use and entry.state != QUARANTINED:
            await self.try_evict(key)

    async def finish(self, key: str) -> None:
        """Drop what a failing disk has kept of a quarantined image that was evicted: no byte of it may come back.

        Raises OSError where it still fails.
        """
        entry = self._states.get(key)
        if entry is not None and entry.state == QUARANTINED:
            await self._opened.remove(entry.record, key, lambda: None)

    async def _check_replaceable(self, entry: ImageEntry) -> None:
        """Raise ImageRefused unless an image can be fetched again, or nobody can find it any more."""
        seen: ImageRecord | LazyImgError
        try:
            seen = await self._glance.image(entry.record.id)
        except (ImageNotFound, ImageForbidden) as exc:
            seen = exc
        entry = await self._states.seen(entry, self._opened.get(entry.key), seen)
        if entry.state in KEPT:
            raise ImageRefused(
                f"image {entry.record.id}: kept, Glance no longer has it or gives it out: what is here is all there is"
            )
