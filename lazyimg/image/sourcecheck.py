"""Compares what was fetched of an image with Glance's own hash of it, once all of it is here.

Bytes that are not what the hash says are never served again: the image is quarantined (I1).  What was found right is
kept durably, and not looked at again as long as no chunk of it is dropped.  The hash is of the source: of a decoded
image that has to come once more, in the background like hydration, and goes by unless it is in use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from lazyimg.core.chunks import chunk_count
from lazyimg.core.header import is_decoded
from lazyimg.core.identity import ImageRecord
from lazyimg.core.pace import Pace
from lazyimg.errors import ChunkAbsent, ChunkDamaged, GlanceUnavailable, LazyImgError
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.hydrator import is_busy, is_hydrated
from lazyimg.image.lazyimage import LazyImage, SourceHash
from lazyimg.image.slots import FlightSlots
from lazyimg.image.source import Glance
from lazyimg.image.sourcepass import PassImpossible, SourcePass
from lazyimg.image.states import CHANGED, JUDGING, QUARANTINED
from lazyimg.image.verification import STEP_BYTES, hash_of
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Whole images that were not compared yet are looked for this often.
LOOK_INTERVAL_S = 2.0
# One that could not be compared is tried again after this.
AGAIN_S = 600.0
# Attempts at a part of the source, and the pause after one that failed.
ATTEMPTS_MAX = 5
ATTEMPT_PAUSE_S = 10.0


class CheckedImages(Protocol):
    """What the check needs of the catalog."""

    def open_images(self) -> list[LazyImage]:
        """Return the images whose chunk file is open."""

    def entries(self) -> list[tuple[ImageEntry, LazyImage | None]]:
        """Return all that is known of images."""

    async def image_of(self, key: str) -> LazyImage:
        """Return an image, opening it if it is not open."""

    async def hashed(self, image: LazyImage, outcome: SourceHash) -> None:
        """Note what came of it."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the source of decoded images comes from: Glance, in background slots, at a pace."""

    glance: Glance
    slots: FlightSlots
    pace: Pace


class SourceCheck:
    """The background work of a daemon that proves whole images."""

    def __init__(
        self,
        images: CheckedImages,
        disk: DiskHealth,
        limiter: trio.CapacityLimiter,
        source: Source | None,
        *,
        bytes_per_s: int,
    ) -> None:
        """limiter: of the threads that hash.  source: None where nothing may be fetched for nobody.

        bytes_per_s: hashed of all images together, 0 for no limit.
        """
        self._images = images
        self._disk = disk
        self._source = source
        self._limiter = limiter
        self._pace = Pace(bytes_per_s)
        # By key; of images that are whole and not verified.
        self._again_at_s: dict[str, float] = {}
        # Of these, how often a pass over the source came to another hash.
        self._other_hashes: dict[str, int] = {}

    async def run(self) -> None:
        """Compare until cancelled."""
        while True:
            # While it is not, what fails says nothing of the image.
            await self._disk.wait_normal()
            key = self._next_nowait()
            if key is None:
                await trio.sleep(LOOK_INTERVAL_S)
            else:
                self._again_at_s[key] = trio.current_time() + AGAIN_S
                await self._check(key)

    def _next_nowait(self) -> str | None:
        """Return the image to compare now, those that guests hold open first."""
        due = [one for one in self._images.entries() if is_unproven(one[0]) and self._may_check(*one)]
        keys = {entry.key for entry, _ in due}
        self._again_at_s = {key: at_s for key, at_s in self._again_at_s.items() if key in keys}
        self._other_hashes = {key: count for key, count in self._other_hashes.items() if key in keys}
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
            if source_hash is None:
                return
            damage_count = image.damage_count
            if image.is_decoded:
                outcome = await self._pass_over_source(image, key, source_hash[1])
            else:
                digest = await self._digest(image, source_hash[0])
                outcome = "match" if digest == source_hash[1] else "mismatch"
            if image.damage_count == damage_count:
                await self._images.hashed(image, outcome)
        except (ChunkAbsent, ChunkDamaged) as exc:
            logger.info("image of key %s: not whole any more: %s", key, exc)
        except (LazyImgError, OSError, KeyError, PassImpossible) as exc:
            logger.info("image of key %s: not compared with its hash now: %s", key, exc)
            if not self._disk.may_read:
                # Again as soon as the disk is back.  Not so after one error, which may be a bad sector's.
                self._again_at_s.pop(key, None)

    def _may_check(self, entry: ImageEntry, image: LazyImage | None) -> bool:
        """False for a decoded image whose source must not be fetched now."""
        if not is_decoded(entry.record, entry.view):
            return True
        return self._source is not None and entry.in_use and (image is None or is_hydrated(image))

    async def _pass_over_source(self, image: LazyImage, key: str, expected: str) -> SourceHash:
        """Compare a decoded image with its source, and that with its hash."""
        one = await self._in_thread(SourcePass, image.record, image)
        while not one.is_over:
            if one.fed_stop == one.planned_stop:
                plan = one.plan()
                while await self._in_thread(next, plan, "over") is None:
                    pass
            data = await self._part_of_source(
                image, one.fed_stop, min(one.fed_stop + STEP_BYTES, one.planned_stop)
            )
            await self._in_thread(one.feed, data)
        if one.hexdigest() == expected:
            if one.difference is not None:
                logger.error("image %s: not what its source decodes to: %s", image.record.id, one.difference)
            return "match" if one.difference is None else "mismatch"
        # What came now may have been a lie.  Believed where it came so twice, and is what came before too.
        self._other_hashes[key] = self._other_hashes.get(key, 0) + 1
        is_believed = one.difference is None and self._other_hashes[key] > 1
        logger.warning("image %s: what Glance sends of it is not of the hash that it states", image.record.id)
        return "mismatch" if is_believed else "unknown"

    async def _part_of_source(self, image: LazyImage, start: int, stop: int) -> bytes:
        """Return a part of the source from Glance, giving way to all who wait for bytes."""
        assert self._source is not None
        for _ in range(ATTEMPTS_MAX - 1):
            try:
                return await self._fetched(self._source, image.record, start, stop)
            except GlanceUnavailable:
                await trio.sleep(ATTEMPT_PAUSE_S)
        return await self._fetched(self._source, image.record, start, stop)

    async def _fetched(self, source: Source, record: ImageRecord, start: int, stop: int) -> bytes:
        size_bytes = record.size_bytes or 0
        await trio.sleep(source.pace.wait_s(trio.current_time()))
        await self._disk.wait_normal()
        while is_busy(self._images.open_images()):  # noqa: ASYNC110  (what is waited for is that time passes)
            await trio.sleep(LOOK_INTERVAL_S)
        async with (
            source.slots.background(),
            source.glance.open_range(
                record.id, start, stop, size_bytes=size_bytes, checksum=record.checksum
            ) as body,
        ):
            data = b"".join([part async for part in body])
        now_s = trio.current_time()
        source.pace.spend(stop - start, now_s)
        self._pace.spend(stop - start, now_s)
        return data

    async def _in_thread(self, function: Callable[..., _T], *args: object) -> _T:
        return await self._disk.read(function, *args, limiter=self._limiter)

    async def _digest(self, image: LazyImage, algo: str) -> str:
        """Return the hash of the whole file, read at the pace."""

        async def paced(start: int, stop: int) -> None:
            self._pace.spend(stop - start, trio.current_time())
            await trio.sleep(self._pace.wait_s(trio.current_time()))
            await self._disk.wait_normal()

        return await hash_of(algo, image.size_bytes, image.stored, self._disk, self._limiter, paced)


def is_unproven(entry: ImageEntry) -> bool:
    """True for an image that is durably whole and could be compared with Glance's hash, and was not."""
    return (
        not entry.verified
        and entry.present_count == chunk_count(entry.size_bytes)
        and entry.state not in (JUDGING, CHANGED, QUARANTINED)
        and entry.record.source_hash is not None
    )
