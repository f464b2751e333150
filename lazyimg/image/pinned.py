"""Glance as one image's source: the image as it was when it was first seen, and no other under its id.

Guards "never another identity's bytes" (I1): Glance's images never change once they are active, but a Glance that is
rebuilt may use an id again.  Every body is compared by what Glance says of its content before a byte of it counts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageChanged, ImageForbidden, ImageNotFound
from lazyimg.image.source import Glance

# Statuses of a record that tells what the image's content is; others are of one that is being made or removed.
SETTLED = frozenset({"active", "deactivated"})


class PinnedSource:
    """One image's identity in Glance; `Glance` for its fetcher."""

    def __init__(self, glance: Glance, record: ImageRecord, has_news: Callable[[], None]) -> None:
        """has_news: called when Glance's record of the image is not what it was."""
        self._glance = glance
        self._record = record
        self._has_news = has_news

    async def image(self, image_id: str) -> ImageRecord:
        """Return Glance's record.  Raises ImageChanged too, where it is of other content."""
        try:
            record = await self._glance.image(image_id)
        except (ImageNotFound, ImageForbidden):
            self._has_news()
            raise
        if record.status != self._record.status:
            self._has_news()
        if is_other(record, self._record):
            self._has_news()
            raise ImageChanged(changed_reason(self._record))
        return record

    async def wait_recovered(self) -> None:
        await self._glance.wait_recovered()

    def open_range(
        self,
        image_id: str,
        start: int,
        stop: int,
        *,
        size_bytes: int,
        checksum: str | None = None,
        is_urgent: bool = False,
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        checksum = checksum or self._record.checksum
        return self._glance.open_range(
            image_id, start, stop, size_bytes=size_bytes, checksum=checksum, is_urgent=is_urgent
        )

    def open_stream(
        self, image_id: str, *, size_bytes: int, checksum: str | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._glance.open_stream(
            image_id, size_bytes=size_bytes, checksum=checksum or self._record.checksum
        )


def is_other(seen: ImageRecord, pinned: ImageRecord) -> bool:
    """True if Glance has other content under the id now."""
    return seen.status in SETTLED and not seen.is_same_as(pinned)


def changed_reason(pinned: ImageRecord) -> str:
    """Return what an operator is told of an image that is not what it was."""
    return (
        f"image {pinned.id}: Glance has other content under this id than when it was first seen here; what is absent "
        "of the old cannot come any more: restart its guests on another image"
    )
