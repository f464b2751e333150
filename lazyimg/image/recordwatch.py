"""Asks Glance now and then for the records of the images in use, so that an operator hears before a guest does.

Deletion, deactivation, other content under an id, and their ends are noticed here, and by readers, who wake this.
"""

from __future__ import annotations

import logging
import random
from typing import Protocol

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageForbidden, ImageNotFound, LazyImgError
from lazyimg.image.listing import Records
from lazyimg.image.states import ACTIVE
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)

# Looked this often, a quarter more or less by chance, so that hosts do not ask together.
INTERVAL_S = 300.0
# And this often while an image in use stands badly: its guests wait for it to stand well again.
INTERVAL_TROUBLE_S = 15.0
# From the daemon's start to the first look, by chance up to this; and shortest time between two.
FIRST_S = 10.0
PAUSE_S = 1.0
# Up to so many images are asked for one by one, more by the list of all.
SINGLE_MAX = 8


class Watched(Protocol):
    """What the watch needs of the catalog."""

    def watched(self) -> list[ImageEntry]:
        """Return the entries of images in use."""

    async def seen(self, entry: ImageEntry, seen: ImageRecord | LazyImgError) -> None:
        """Note what Glance answered."""


class RecordWatch:
    """The records of images in use, looked at now and then and when there is news."""

    def __init__(self, glance: Records) -> None:
        self._glance = glance
        self._news = trio.Event()

    def wake(self) -> None:
        """Look soon: a reader was told something of its image."""
        self._news.set()

    async def run(self, images: Watched) -> None:
        """Look until cancelled."""
        interval_s = random.uniform(0, FIRST_S)
        while True:
            with trio.move_on_after(interval_s):
                await self._news.wait()
            self._news = trio.Event()
            await self.look(images)
            is_well = all(entry.state == ACTIVE for entry in images.watched())
            interval_s = (INTERVAL_S if is_well else INTERVAL_TROUBLE_S) * random.uniform(0.75, 1.25)
            await trio.sleep(PAUSE_S)

    async def look(self, images: Watched) -> None:
        """Ask once for all images in use; what Glance does not answer now is asked next time."""
        entries = images.watched()
        listed: dict[str, ImageRecord] = {}
        try:
            if len(entries) > SINGLE_MAX:
                listed = {record.id: record for record in await self._glance.list_images()}
            for entry in entries:
                await self._look_at(images, entry, listed.get(entry.record.id))
        except LazyImgError as exc:
            logger.info("records of images in use: not known now: %s", exc)

    async def _look_at(self, images: Watched, entry: ImageEntry, listed: ImageRecord | None) -> None:
        seen: ImageRecord | LazyImgError | None = listed
        # Only the record itself is believed where it says that something changed for the worse.
        if listed is None or listed.status != ACTIVE or not listed.is_same_as(entry.record):
            try:
                seen = await self._glance.image(entry.record.id)
            except (ImageNotFound, ImageForbidden) as exc:
                seen = exc
        if seen is not None:
            await images.seen(entry, seen)
