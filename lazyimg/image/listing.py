"""The list of Glance's images, asked for when a name is not in it: it only leads from a name to an id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageNotFound
from lazyimg.image.source import Glance


class GlanceListing(Glance, Protocol):
    """Glance with its list of images."""

    async def list_images(self) -> list[ImageRecord]: ...


class Listing:
    """The list as it was last read."""

    def __init__(self, glance: GlanceListing) -> None:
        self._glance = glance
        self._listed: dict[str, ImageRecord] = {}
        self._listed_at = float("-inf")
        self._lock = trio.Lock()

    async def record(self, base_name: str) -> ImageRecord:
        """Return the record, as it is now, of the image with this base name.  Raises ImageNotFound."""
        asked_at = trio.current_time()
        listed = self._listed.get(base_name)
        if listed is None:
            # One list answers all who asked before it was begun.
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
                return
            began_at = trio.current_time()
            self._listed = {record.base_name: record for record in await self._glance.list_images()}
            self._listed_at = began_at
