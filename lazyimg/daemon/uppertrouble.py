"""Tells the operator's log what the disk beneath the mount refuses: whoever wrote there is told by errno alone."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from time import monotonic

logger = logging.getLogger(__name__)

# What the disk is to blame for, not the caller.
TROUBLES = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# A full disk refuses every write: one line in so long for each errno.
INTERVAL_S = 60


class UpperTrouble:
    """The errors of the upper folder's disk that were told lately."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._told_at: dict[int, float] = {}

    def note(self, what: str, error: OSError) -> None:
        """Log an error of the disk's, unless its like was told a moment ago."""
        number = error.errno
        if number not in TROUBLES:
            return
        now = self._clock()
        if now - self._told_at.get(number, float("-inf")) >= INTERVAL_S:
            self._told_at[number] = now
            logger.warning("the folder beneath the mount: %s: %s; see to its disk", what, error.strerror)
