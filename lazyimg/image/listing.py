"""The list of Glance's images, asked for when a name is not in it: it only leads from a name to an id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, ImageNotFound


class Records(Protocol):
    """The part of Glance that a lookup may wait for."""

    async def image(self, image_id: str) -> ImageRecord: ...

    async def list_images(self) -> list[ImageRecord]: ...


class Listing:
    """The list as it was last read."""

    def __init__(self, glance: Records) -> None:
        self._glance = glance
        self._listed: dict[str, ImageRecord] = {}
        # When the last list was begun, and what came of it if that was no list.
        self._listed_at = float("-inf")
        self._failure: GlanceUnavailable | None = None
        self._lock = trio.Lock()

    async def record(self, base_name: str) -> ImageRecord:
        """Return the record, as it is now, of the image with this base name.  Raises ImageNotFound."""
        asked_at = trio.current_time()
        listed = self._listed.get(base_name)
        if listed is None:
            # One list answers all who asked before it was begun; so does one that failed.
            await self._read(is_fresh_enough=lambda: self._listed_at >= asked_at)
            listed = self._listed.get(base_name)
        if listed is None:
            raise ImageNotFound(f"{base_name}: no image of Glance's has this name")
        return await self._glance.image(listed.id)

    async def named(self, name: str) -> list[ImageRecord]:
        """Return the images that have this name or id now."""
        await self._read(is_fresh_enough=lambda: False)
        return [record for record in self._listed.values() if name in (record.name, record.id)]

    async def _read(self, is_fresh_enough: Callable[[], bool]) -> None:
        async with self._lock:
            if is_fresh_enough():
                if self._failure is not None:
                    raise GlanceUnavailable(str(self._failure)) from self._failure
                return
            began_at = trio.current_time()
            try:
                listed = await self._glance.list_images()
            except GlanceUnavailable as exc:
                self._listed_at, self._failure = began_at, exc
                raise
            self._listed = {record.base_name: record for record in listed}
            self._listed_at, self._failure = began_at, None
