"""The images whose chunk files are open: each is opened once, when it is first needed, and closed to be dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import InUse
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.maker import Maker
from lazyimg.image.states import impose
from lazyimg.store.cachedir import CacheDir


@dataclass(frozen=True, slots=True)
class FetchTotals:
    """What all images together cost since the daemon started, those closed since among them."""

    requests: int = 0
    fetched_bytes: int = 0
    retries: int = 0

    def plus(self, image: LazyImage) -> FetchTotals:
        """Return these and an image's."""
        one = image.statistics().fetch
        return FetchTotals(
            self.requests + one.requests, self.fetched_bytes + one.fetched_bytes, self.retries + one.retries
        )


class OpenImages:
    """All images of one view that are open, by key.

    handles: how often each image is open to guests since before this daemon, by key; they stay.
    """

    def __init__(
        self, cache: CacheDir, maker: Maker, limiter: trio.CapacityLimiter, handles: Mapping[str, int]
    ) -> None:
        self._cache = cache
        self._maker = maker
        self._limiter = limiter
        # Each is counted at the image itself from its first use on.
        self._handles = dict(handles)
        self._images: dict[str, LazyImage] = {}
        # Of images closed since; without it a total would fall when an image is dropped.
        self._closed_totals = FetchTotals()
        # By key, for as long as anybody holds one or waits for it.
        self._opening: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    def get(self, key: str) -> LazyImage | None:
        """Return the image if it is open."""
        return self._images.get(key)

    def all(self) -> list[LazyImage]:
        return list(self._images.values())

    def held_keys(self) -> set[str]:
        """Return the images that guests hold open."""
        return {key for key, image in self._images.items() if image.open_handles} | self._handles.keys()

    def totals(self) -> FetchTotals:
        """Return what all images cost since the daemon started."""
        totals = self._closed_totals
        for image in self._images.values():
            totals = totals.plus(image)
        return totals

    async def open(self, key: str, head: bytes | None = None) -> LazyImage:
        """Return an image that the index has, opening its chunk file if that is not open.

        head: the source's first bytes, where they are at hand.  Raises KeyError or OSError.
        """
        image = self._images.get(key)
        if image is not None:
            return image
        async with self._opening.setdefault(key, trio.Lock()):
            image = self._images.get(key)
            if image is None:
                entry = self._cache.index.get(key)
                if entry is None:
                    raise KeyError(key)
                file = await trio.to_thread.run_sync(self._cache.open_image, key, limiter=self._limiter)
                try:
                    image = await self._maker.make(entry.record, file, head)
                    impose(image, entry.state, entry.reason)
                    self._images[key] = image
                except BaseException:
                    self._cache.close_image(key)
                    raise
                image.opened(self._handles.pop(key, 0))
        return image

    def close(self, key: str) -> None:
        """Close an image's chunk file.  On the event loop, whose reads use the descriptor without a lock."""
        image = self._images.pop(key, None)
        if image is not None:
            self._closed_totals = self._closed_totals.plus(image)
            image.drop()
        self._cache.close_image(key)

    async def remove(self, record: ImageRecord, key: str, unpublish: Callable[[], None]) -> int:
        """Close and remove an image, bytes and entry; return the bytes freed.

        unpublish: called when it is certain, before anything is removed.  Raises InUse where it is open.
        """
        async with self._opening.setdefault(key, trio.Lock()):
            image = self._images.get(key)
            if image is not None and image.open_handles:
                raise InUse(f"image {record.id}: open by {image.open_handles} handles; end its guests first")
            if key in self._handles:
                raise InUse(f"image {record.id}: open by {self._handles[key]} handles; end its guests first")
            # From here on nobody finds it; no `await` between the check and this.
            unpublish()
            if image is not None:
                self.close(key)
            freed_bytes = await trio.to_thread.run_sync(
                self._cache.allocated_bytes, key, limiter=self._limiter
            )
            await trio.to_thread.run_sync(self._cache.remove_image, key, limiter=self._limiter)
        return freed_bytes

    def busy_keys(self) -> set[str]:
        """Return the images that are open to guests, or being fetched."""
        busy = {key for key, image in self._images.items() if image.open_handles or not image.fetcher.is_idle}
        return busy | self._handles.keys()
