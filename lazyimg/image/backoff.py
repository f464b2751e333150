"""How long one image's flights pause after a failure: jittered, exponential, never longer than a guest may wait."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import trio

from lazyimg.errors import GlanceUnavailable, LazyImgError

logger = logging.getLogger(__name__)

# First pause after a failed attempt; doubles, half of it by chance, up to `retry_pause_max`.
RETRY_PAUSE_MIN_S = 0.05
# Failures in a row that an operator should hear of; the others are told at INFO.
FAILURES_TOLD = 3


class Backoff:
    """The pauses of one image; one at a time, whoever failed first.

    wait_recovered: returns when a Glance that did not answer does again, upon which a pause ends.
    """

    def __init__(
        self, image_id: str, pause_max_s: float, wait_recovered: Callable[[], Awaitable[None]]
    ) -> None:
        self._image_id = image_id
        self._pause_max_s = pause_max_s
        self._wait_recovered = wait_recovered
        self._failures = 0
        self.is_paused = False
        self.retries = 0

    def succeeded(self) -> None:
        """Bytes came: the next failure is the first of a row."""
        self._failures = 0

    async def pause(self, error: LazyImgError) -> None:
        """Pause after `error`, as long as it asks for (Retry-After) if that is not too long; at once if paused."""
        if self.is_paused:
            return
        self._failures += 1
        self.retries += 1
        pause_s = min(RETRY_PAUSE_MIN_S * 2 ** min(self._failures - 1, 20), self._pause_max_s)
        # Half of it by chance, so that many images and hosts do not come back at the same instant.
        pause_s *= random.uniform(0.5, 1)
        wait_no_longer = self._wait_recovered
        if isinstance(error, GlanceUnavailable) and error.retry_after_s is not None:
            pause_s = min(max(pause_s, error.retry_after_s), self._pause_max_s)
            # A server that names a time is not away: nothing ends this pause early.
            wait_no_longer = trio.sleep_forever
        # A flight that a passing fault cost is normal operation; several in a row are not.
        level = logging.WARNING if self._failures == FAILURES_TOLD else logging.INFO
        logger.log(level, "image %s: %s; trying again in %.1f s", self._image_id, error, pause_s)
        self.is_paused = True
        try:
            with trio.move_on_after(pause_s):
                await wait_no_longer()
        finally:
            self.is_paused = False
