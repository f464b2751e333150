"""Compares what was fetched of an image with Glance's own hash of it, once all of it is here.

Bytes that are not what the hash says are never served again: the image is quarantined (I1).  What was found right is
kept durably, and not looked at again as long as no chunk of it is dropped.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Protocol

import trio

from lazyimg.core.chunks import chunk_count
from lazyimg.core.pace import Pace
from lazyimg.errors import ChunkAbsent, ChunkDamaged, LazyImgError
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.lazyimage import LazyImage, SourceHash
from lazyimg.image.states import CHANGED, JUDGING, QUARANTINED
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)

# Whole images that were not compared yet are looked for this often.
LOOK_INTERVAL_S = 2.0
# One that could not be compared is tried again after this.
AGAIN_S = 600.0
# Read and hashed in one go: some 8 ms of SHA-512.
STEP_BYTES = 4 << 20


class CheckedImages(Protocol):
    """What the check needs of the catalog."""

    def entries(self) -> list[tuple[ImageEntry, LazyImage | None]]:
        """Return all that is known of images."""

    async def image_of(self, key: str) -> LazyImage:
        """Return an image, opening it if it is not open."""

    async def hashed(self, image: LazyImage, outcome: SourceHash) -> None:
        """Note what came of it."""


class SourceCheck:
    """The background work of a daemon that proves whole images."""

    def __init__(
        self, images: CheckedImages, disk: DiskHealth, limiter: trio.CapacityLimiter, *, bytes_per_s: int
    ) -> None:
        """limiter: of the threads that hash.  bytes_per_s: hashed of all images together, 0 for no limit."""
        self._images = images
        self._disk = disk
        self._limiter = limiter
        self._pace = Pace(bytes_per_s)
        # By key; of images that are whole and not verified.
        self._again_at_s: dict[str, float] = {}

    async def run(self) -> None:
        """Compare until cancelled."""
        while True:
            key = self._next_nowait()
            if key is None:
                await trio.sleep(LOOK_INTERVAL_S)
            else:
                self._again_at_s[key] = trio.current_time() + AGAIN_S
                await self._check(key)

    def _next_nowait(self) -> str | None:
        """Return the image to compare now, those that guests hold open first."""
        due = [(entry, image) for entry, image in self._images.entries() if is_unproven(entry)]
        keys = {entry.key for entry, _ in due}
        self._again_at_s = {key: at_s for key, at_s in self._again_at_s.items() if key in keys}
        now_s = trio.current_time()
        ready = [one for one in due if self._again_at_s.get(one[0].key, now_s) <= now_s]
        if not ready:
            return None
        entry, _ = min(ready, key=lambda one: (one[1] is None or not one[1].open_handles, one[0].size_bytes))
        return entry.key

    async def _check(self, key: str) -> None:
        try:
            image = await self._images.image_of(key)
            source_hash = image.record.source_hash
            if source_hash is None or image.is_decoded:
                return
            damage_count = image.damage_count
            digest = await self._digest(image, source_hash[0])
            if image.damage_count == damage_count:
                await self._images.hashed(image, "match" if digest == source_hash[1] else "mismatch")
        except (ChunkAbsent, ChunkDamaged) as exc:
            logger.info("image of key %s: not whole any more: %s", key, exc)
        except (LazyImgError, OSError, KeyError) as exc:
            logger.info("image of key %s: not compared with its hash now: %s", key, exc)

    async def _digest(self, image: LazyImage, algo: str) -> str:
        """Return the hash of the whole file, read at the pace."""
        digest = hashlib.new(algo, usedforsecurity=False)

        def step(start: int, stop: int) -> None:
            digest.update(image.stored(start, stop))

        for start in range(0, image.size_bytes, STEP_BYTES):
            stop = min(start + STEP_BYTES, image.size_bytes)
            await self._disk.read(step, start, stop, limiter=self._limiter)
            self._pace.spend(stop - start, trio.current_time())
            await trio.sleep(self._pace.wait_s(trio.current_time()))
        return digest.hexdigest()


def is_unproven(entry: ImageEntry) -> bool:
    """True for an image that is durably whole and could be compared with Glance's hash, and was not."""
    return (
        not entry.verified
        and entry.present_count == chunk_count(entry.size_bytes)
        and entry.state not in (JUDGING, CHANGED, QUARANTINED)
        and entry.record.source_hash is not None
    )
