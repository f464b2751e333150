"""Fetches the rest of images in use, in the background, so that their guests no longer depend on Glance.

One image at a time and of it one request's worth at a time, those that miss least first: so the fewest guests are
at risk.  Guards I4: it begins nothing while anybody waits for bytes, of whatever image; a step is as long as the
network takes about half a second for, so that no reader finds more than that in its way.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import trio

from lazyimg.core.chunks import CHUNK_SIZE_BYTES
from lazyimg.core.pace import Pace
from lazyimg.errors import LazyImgError
from lazyimg.image.lazyimage import LazyImage

logger = logging.getLogger(__name__)

# What is due is looked for this often.
LOOK_INTERVAL_S = 1.0
# Nothing is begun this soon after an urgent want of any image.
QUIET_S = 1.0
# A step begins small and grows or shrinks until it takes between these.
STEP_BYTES_MIN, STEP_BYTES_MAX = CHUNK_SIZE_BYTES, 8 << 20
STEP_BYTES_FIRST = 1 << 20
STEP_SHORT_S, STEP_LONG_S = 0.25, 1.0
# An image from which nothing came for so long, or that failed, makes way for the others for a while.
STEP_LIMIT_S = 60.0
SET_ASIDE_S = 60.0
# A property of an image's in Glance that keeps it from being hydrated, when it says one of these.
PROPERTY = "lazyimg_hydrate"
OFF = frozenset({"false", "no", "off", "0"})


@dataclass(frozen=True, slots=True)
class _SetAside:
    """How often in a row an image brought nothing, and until when it makes way for the others."""

    count: int = 0
    until_s: float = float("-inf")


class HeldImages(Protocol):
    """What the hydrator needs of the catalog."""

    def open_images(self) -> list[LazyImage]:
        """Return the images whose chunk file is open."""

    async def held_images(self) -> list[LazyImage]:
        """Return the images that guests hold open."""


class Room(Protocol):
    """What the hydrator needs of the cache's space."""

    @property
    def is_full(self) -> bool:
        """True while nothing is stored."""


class Disk(Protocol):
    """What the hydrator needs of the cache's disk."""

    @property
    def is_normal(self) -> bool:
        """False while something is wrong with it."""

    async def wait_normal(self, *, normal: bool) -> None:
        """Wait until it is so, or not."""


class Hydrator:
    """The background work of a daemon that makes its images whole."""

    def __init__(self, images: HeldImages, room: Room, disk: Disk, pace: Pace, *, delay_s: float) -> None:
        """delay_s: from an image's last urgent want.  pace: of what is fetched for all images together."""
        self._images = images
        self._room = room
        self._disk = disk
        self._delay_s = delay_s
        self._pace = pace
        # No more than a second's worth: a rate is no leave for bursts.
        second_bytes = max(pace.bytes_per_s, STEP_BYTES_MIN) if pace.bytes_per_s else STEP_BYTES_MAX
        self._step_bytes_max = min(STEP_BYTES_MAX, second_bytes)
        self._step_bytes = min(STEP_BYTES_FIRST, self._step_bytes_max)
        # By inode; only of images that are held and brought nothing the last time.
        self._set_aside: dict[int, _SetAside] = {}

    async def run(self) -> None:
        """Hydrate until cancelled."""
        while True:
            await trio.sleep(self._pace.wait_s(trio.current_time()))
            image = self._next_nowait(await self._images.held_images())
            if image is None:
                await trio.sleep(LOOK_INTERVAL_S)
            else:
                await self._hydrate(image)

    def _next_nowait(self, held: list[LazyImage]) -> LazyImage | None:
        """Return the image to go on with, None when there is nothing to do now."""
        now_s = trio.current_time()
        inodes = {image.inode for image in held}
        self._set_aside = {inode: one for inode, one in self._set_aside.items() if inode in inodes}
        is_unkept = self._room.is_full or not self._disk.is_normal
        if is_unkept or is_busy(self._images.open_images()):
            return None
        due = [
            image
            for image in held
            if not image.is_whole
            and is_hydrated(image)
            and now_s - image.last_wanted_s >= self._delay_s
            and self._aside(image).until_s <= now_s
        ]
        # Those that failed come last, or a few of them would take all the turns.
        return min(
            due, key=lambda image: (self._aside(image).count, image.missing_bytes, image.inode), default=None
        )

    def _aside(self, image: LazyImage) -> _SetAside:
        return self._set_aside.get(image.inode, _SetAside())

    async def _hydrate(self, image: LazyImage) -> None:
        """Fetch a step's worth of one image, unless it is released meanwhile or the cache's disk fails."""
        began_s = trio.current_time()
        missing_bytes = image.missing_bytes
        fetched_bytes, streamed_bytes = image.statistics().fetch.fetched_bytes, image.streamed_bytes_max
        with trio.move_on_after(STEP_LIMIT_S) as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_then_cancel, image.wait_released, nursery.cancel_scope)
                is_failing = partial(self._disk.wait_normal, normal=False)
                nursery.start_soon(_then_cancel, is_failing, nursery.cancel_scope)
                try:
                    await image.hydrate(self._step_bytes)
                except (LazyImgError, OSError) as exc:
                    logger.info("image %s: not hydrated for now: %s", image.record.id, exc)
                nursery.cancel_scope.cancel()
        now_s = trio.current_time()
        # A stream pays for itself.
        if image.source != "stream":
            self._pace.spend(image.statistics().fetch.fetched_bytes - fetched_bytes, now_s)
        if not self._disk.is_normal:
            # Nothing could be kept; the image is not to blame.
            return
        # At a low rate a stream takes longer than a step to come to what is absent.
        if image.missing_bytes >= missing_bytes and image.streamed_bytes_max <= streamed_bytes:
            self._set_aside[image.inode] = _SetAside(self._aside(image).count + 1, now_s + SET_ASIDE_S)
            return
        self._set_aside.pop(image.inode, None)
        if scope.cancelled_caught or now_s - began_s > STEP_LONG_S:
            self._step_bytes = max(self._step_bytes // 2, STEP_BYTES_MIN)
        elif now_s - began_s < STEP_SHORT_S:
            self._step_bytes = min(self._step_bytes * 2, self._step_bytes_max)
        if image.is_whole:
            await image.commit()
            logger.info("image %s: all of it is here; its guests depend on Glance no longer", image.record.id)


def is_busy(images: list[LazyImage]) -> bool:
    """True while somebody waits for bytes, or did a moment ago: then nothing is begun for nobody."""
    now_s = trio.current_time()
    return any(now_s - image.last_wanted_s < QUIET_S for image in images)


def is_hydrated(image: LazyImage) -> bool:
    """True unless the image's own property says otherwise."""
    return image.record.properties.get(PROPERTY, "").strip().lower() not in OFF


async def _then_cancel(wait: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await wait()
    scope.cancel()
