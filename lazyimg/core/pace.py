"""How fast background work may go.  Pure: no I/O and no clock."""

from __future__ import annotations

# Streams that go on slowly at once, beside all requests: enough for the images of a host that become whole by one.
SLOW_STREAMS_MAX = 4


class Pace:
    """So many bytes a second on average: what was spent is paid for by waiting before the next is.

    bytes_per_s: 0 for no limit.  Times are of any clock that only rises.
    """

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._paid_at_s = float("-inf")

    def spend(self, size_bytes: int, now_s: float) -> None:
        """Note what was just spent.  Time that went by unused is not saved up: there are no bursts."""
        if self.bytes_per_s:
            self._paid_at_s = max(self._paid_at_s, now_s) + size_bytes / self.bytes_per_s

    def wait_s(self, now_s: float) -> float:
        """Return how long to wait before anything is spent again."""
        return max(0.0, self._paid_at_s - now_s)
