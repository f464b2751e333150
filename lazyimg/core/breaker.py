"""Whether a server is worth asking: a circuit breaker.

Pure: times are passed in.  A server that does not answer is left alone for a pause, then asked once:

              failures_max failures in a row           the pause is over, `may_ask`
    closed ──────────────────────────────────► open ──────────────────────────────► half-open: one probe is out
      ▲                                          ▲                                       │
      │                                          └── it fails: the next pause is longer ──┤
      └───────────────────────── an answer, the probe's or another's ─────────────────────┘
"""

from __future__ import annotations

import math
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]


class Breaker:
    """What is known of one server; `since_s` is when its state began, `last_error` why it was left alone.

    Pauses double from pause_min_s to pause_max_s.  No chance in them: hosts find a server down at different times.
    """

    def __init__(self, failures_max: int, pause_min_s: float, pause_max_s: float) -> None:
        self._failures_max = failures_max
        self._pause_min_s = pause_min_s
        self._pause_max_s = pause_max_s
        self._pause_s = pause_min_s
        self._failures = 0
        self.state: BreakerState = "closed"
        self.since_s = -math.inf
        self.last_error: str | None = None
        # While open: when a probe may go out.
        self.probe_at_s = math.inf

    @property
    def is_closed(self) -> bool:
        return self.state == "closed"

    def may_ask(self, now_s: float) -> bool:
        """True if the server may be asked now; where it is not closed the asker is the one probe, and must report."""
        if self.state == "open" and now_s >= self.probe_at_s:
            self._enter("half-open", now_s)
            return True
        return self.is_closed

    def answered(self, now_s: float) -> None:
        """The server has answered, whoever asked."""
        self._failures = 0
        self._pause_s = self._pause_min_s
        if not self.is_closed:
            self._enter("closed", now_s)

    def failed(self, now_s: float, error: str, *, is_probe: bool) -> None:
        """The server has not answered; of requests sent before it was left alone only the error is noted."""
        self.last_error = error
        if self.is_closed:
            self._failures += 1
            if self._failures >= self._failures_max:
                self._open(now_s)
        elif is_probe and self.state == "half-open":
            self._pause_s = min(2 * self._pause_s, self._pause_max_s)
            self._open(now_s)

    def probe_ended(self, now_s: float) -> None:
        """The probe was given up without an outcome: the next asker is it."""
        if self.state == "half-open":
            self._enter("open", now_s)
            self.probe_at_s = now_s

    def _open(self, now_s: float) -> None:
        self._enter("open", now_s)
        self.probe_at_s = now_s + min(self._pause_s, self._pause_max_s)

    def _enter(self, state: BreakerState, now_s: float) -> None:
        # Probes do not make an outage younger.
        if state == "closed" or self.is_closed:
            self.since_s = now_s
        self.state = state
        self.probe_at_s = math.inf
