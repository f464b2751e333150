"""The images whose chunk files are open: each is opened once, when it is first needed, and closed to be dropped."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakValueDictionary

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import InUse, LazyImgError
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.maker import Maker
from lazyimg.image.states import States, impose
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile

logger = logging.getLogger(__name__)


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

    handles: how often each image is open to guests since before this daemon, by key; they stay.  files_max: above
    this many open chunk files the descriptors of those not used lately are closed; their next read opens them again.
    """

    def __init__(
        self,
        cache: CacheDir,
        states: States,
        maker: Maker,
        disk: DiskHealth,
        limiter: trio.CapacityLimiter,
        handles: Mapping[str, int],
        files_max: int,
    ) -> None:
        self._cache = cache
        self._states = states
        self._disk = disk
        self._maker = maker
        self._limiter = limiter
        # Each is counted at the image itself from its first use on.
        self._handles = dict(handles)
        # Some stay free, for those that are opened until this is looked at again.
        self._files_wanted = files_max - files_max // 8
        self._closing = trio.CapacityLimiter(1)
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

    async def held(self, timeout_s: float) -> list[LazyImage]:
        """Return the images of `held_keys`; those that cannot be opened in time are left out."""
        held = []
        for key in self.held_keys():
            try:
                with trio.fail_after(timeout_s):
                    held.append(await self.open(key))
            except (LazyImgError, OSError, KeyError, trio.TooSlowError) as exc:
                # Its header is lost from the cache and Glance does not answer, say; it is looked for again.
                logger.debug("image of key %s: not opened: %r", key, exc)
        return held

    def handles_of(self, key: str) -> int:
        """Return how many handles guests have of an image."""
        image = self._images.get(key)
        return self._handles.get(key, 0) if image is None else image.open_handles

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
                # With what the disk could not note yet: a quarantine outlives the opening that found it out.
                entry = self._states.get(key)
                if entry is None:
                    raise KeyError(key)
                file = await self._open_file(key)
                try:
                    image = await self._maker.make(entry.record, file, head)
                    impose(image, entry.state, entry.reason)
                    self._images[key] = image
                except BaseException:
                    self._cache.close_image(key)
                    raise
                image.opened(self._handles.pop(key, 0))
                if len(self._images) > self._files_wanted:
                    await self.close_idle_files()
        return image

    async def close_idle_files(self) -> None:
        """Close the descriptors of files that were not used since the last call, if more are open than should be."""
        numbers: list[int] = []
        held = [image for image in self._images.values() if image.has_descriptor]
        # First what was not used lately; if that is not enough, whatever is not in use at this moment.
        for image in held * 2:
            if len(held) - len(numbers) <= self._files_wanted:
                break
            number = image.take_idle_descriptor()
            if number is not None:
                numbers.append(number)
        if numbers:
            # Not on the event loop: of a file on a network close may wait for it.
            await trio.to_thread.run_sync(_close_all, numbers, limiter=self._closing)

    async def _open_file(self, key: str) -> ChunkFile:
        try:
            return await self._disk.read(self._cache.open_image, key, limiter=self._limiter)
        except OSError:
            # A guest's image must not wait for the disk: its bytes come from Glance until that is back.
            file = self._cache.open_image_unseen(key)
            if file is None:
                raise
            return file

    def close(self, key: str) -> None:
        """Close an image's chunk file.  On the event loop, whose reads use the descriptor without a lock."""
        image = self._images.pop(key, None)
        if image is not None:
            self._closed_totals = self._closed_totals.plus(image)
            image.drop()
        self._cache.close_image(key)

    async def remove(self, record: ImageRecord, key: str, unpublish: Callable[[], None]) -> int:
        """Close and remove an image, bytes and entry; return the bytes freed.

        unpublish: called when it is certain, before anything is removed.  Raises InUse where it is open, OSError
        where the disk fails.
        """
        async with self._opening.setdefault(key, trio.Lock()):
            self._check_unused(record, key)
            # A disk that fails does so here, before anything has changed.
            freed_bytes = await self._disk.read(self._cache.allocated_bytes, key, limiter=self._limiter)
            self._check_unused(record, key)
            # From here on nobody finds it; no `await` between the check and this.
            unpublish()
            if key in self._images:
                self.close(key)
            await self._disk.write(self._cache.remove_image, key, limiter=self._limiter)
        return freed_bytes

    def _check_unused(self, record: ImageRecord, key: str) -> None:
        handles = self.handles_of(key)
        if handles:
            raise InUse(f"image {record.id}: open by {handles} handles; end its guests first")

    def busy_keys(self) -> set[str]:
        """Return the images that are open to guests, or being fetched."""
        busy = {key for key, image in self._images.items() if image.open_handles or not image.fetcher.is_idle}
        return busy | self._handles.keys()


def _close_all(numbers: list[int]) -> None:
    for number in numbers:
        os.close(number)
