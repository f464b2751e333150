"""When a request that is slow to answer deserves a second one.

Pure: times are passed in.  The measure is the 99th percentile of the latest times to first byte, so that about one
request in a hundred is sent twice; a budget keeps it so when a server as a whole becomes slow.
"""

from __future__ import annotations

from collections import deque

# Times kept, and how many there must be before they say anything.
SAMPLES_MAX = 512
SAMPLES_MIN = 100
QUANTILE = 0.99
# Sorting 512 numbers takes some 20 µs: not after each request.
SAMPLES_PER_MEASURE = 16
# At most so many second requests for each first one, and so many in a row.
BUDGET_SHARE = 0.05
BUDGET_MAX = 4.0
# Waiting less than this a guest does not notice, and our own event loop may be what was slow.
DELAY_MIN_S = 0.05


class Hedging:
    """The latest times to first byte, and the budget."""

    def __init__(self) -> None:
        self._times_s: deque[float] = deque(maxlen=SAMPLES_MAX)
        self._since_measured = 0
        self._delay_s: float | None = None
        self._budget = 0.0

    @property
    def delay_s(self) -> float | None:
        """How long to wait for a first byte before asking a second time; None: that is not known yet."""
        return self._delay_s

    def asked(self) -> None:
        """A request was sent that may be sent a second time."""
        self._budget = min(self._budget + BUDGET_SHARE, BUDGET_MAX)

    def answered(self, first_byte_s: float) -> None:
        """Its first byte came after so long, whichever of the two brought it."""
        self._times_s.append(first_byte_s)
        self._since_measured += 1
        if len(self._times_s) >= SAMPLES_MIN and self._since_measured >= SAMPLES_PER_MEASURE:
            self._since_measured = 0
            nth = int(len(self._times_s) * QUANTILE)
            self._delay_s = max(sorted(self._times_s)[nth], DELAY_MIN_S)

    def take(self) -> bool:
        """True if a second request may be sent now; it is paid for then."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True
