"""Whether Glance is known to be down: then no lookup waits for it (I6).

It is, once a few attempts in a row at a record or the list went unanswered; from then on it is asked now and then,
so that the first answer ends that state, whoever got it.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import Protocol, TypeVar

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, ImageForbidden, ImageNotFound, LazyImgError

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Unanswered attempts in a row that make it known; one or two are a connection that was closed, or a restart.
UNANSWERED_MAX = 3
# Asked this often while it is down.
PROBE_INTERVAL_S = 5


class Records(Protocol):
    """The part of Glance that a lookup may wait for."""

    async def image(self, image_id: str) -> ImageRecord: ...

    async def list_images(self) -> list[ImageRecord]: ...

    async def wait_recovered(self) -> None: ...


class WatchedGlance:
    """Glance's records and list, with a memory of whether they were answered."""

    def __init__(self, glance: Records, nursery: trio.Nursery) -> None:
        self._glance = glance
        self._nursery = nursery
        self._unanswered = 0
        self._is_probing = False

    @property
    def is_known_down(self) -> bool:
        return self._unanswered >= UNANSWERED_MAX

    async def image(self, image_id: str) -> ImageRecord:
        return await self._watched(self._glance.image(image_id))

    async def list_images(self) -> list[ImageRecord]:
        return await self._watched(self._glance.list_images())

    async def wait_recovered(self) -> None:
        await self._glance.wait_recovered()

    async def _watched(self, answer: Awaitable[_T]) -> _T:
        try:
            answered = await answer
        except GlanceUnavailable as exc:
            self._not_answered(exc)
            raise
        except (ImageNotFound, ImageForbidden):
            self._answered()
            raise
        self._answered()
        return answered

    def _answered(self) -> None:
        if self.is_known_down:
            logger.info("Glance answers again")
        self._unanswered = 0

    def _not_answered(self, why: GlanceUnavailable) -> None:
        self._unanswered += 1
        if self.is_known_down and not self._is_probing:
            logger.info("Glance is down (%s): names that are not known here answer EAGAIN at once", why)
            self._is_probing = True
            self._nursery.start_soon(self._probe)

    async def _probe(self) -> None:
        try:
            while self.is_known_down:
                # Whoever else finds that Glance is back ends this too.
                with trio.move_on_after(PROBE_INTERVAL_S):
                    await self._glance.wait_recovered()
                try:
                    await self.list_images()
                except LazyImgError:
                    # Counted; whoever looks a name up is told.
                    continue
                except Exception:
                    logger.exception("asking whether Glance answers failed in an unforeseen way")
        finally:
            self._is_probing = False
