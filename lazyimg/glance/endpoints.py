"""Which endpoint to ask, and whether any is worth asking now: a breaker for each.

Guards I5: a server that does not answer costs one request a pause, not each reader a timeout.  Only the lack of
an answer counts against an endpoint as a whole: a body that breaks off or a 500 may be one image's own, and only
puts it behind the others for a while.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from lazyimg.core.breaker import Breaker, BreakerState
from lazyimg.errors import GlanceUnavailable

logger = logging.getLogger(__name__)

# Behind uwsgi some 5 % of the connections are closed unannounced: three in a row are no accident.
FAILURES_MAX = 3
# Where another endpoint can be asked there is no reason to try a second time.
FAILURES_BESIDE_OTHERS_MAX = 1
# First pause before a server that did not answer is asked again; it doubles up to `retry_pause_max`.
PAUSE_MIN_S = 0.25
# An endpoint that answered, but not well, is asked after the others for so long.
AVOIDED_S = 60.0
# A caller that gives up after this long without an answer has told us that the endpoint hangs.
HANGING_AFTER_S = 1.0
# Longest wait for any endpoint to be worth asking; then whoever retries decides whether anybody still waits.
WAIT_MAX_S = 60.0


@dataclass(frozen=True, slots=True)
class EndpointStatistics:
    """One endpoint now; `since_s` is how long it has been in this state, None: from the start."""

    endpoint: str
    state: BreakerState
    since_s: float | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class Ask:
    """One endpoint that may be asked once; `is_probe`: all others wait for what comes of it."""

    endpoint: str
    is_probe: bool
    # Of that endpoint; kept here since another login may have named others by the time the answer comes.
    breaker: Breaker = field(repr=False, compare=False)


class Endpoints:
    """The endpoints of the current access, in the operator's order of preference."""

    def __init__(self, *, pause_max_s: float) -> None:
        self._pause_max_s = pause_max_s
        self._breakers: dict[str, Breaker] = {}
        self._avoided_until: dict[str, float] = {}
        self._waiting = 0
        # Set, and replaced, when waiting callers should look again.
        self._changed = trio.Event()
        self._recovered = trio.Event()

    @property
    def is_down(self) -> bool:
        """True if no endpoint answers, as far as is known."""
        return bool(self._breakers) and not any(breaker.is_closed for breaker in self._breakers.values())

    def is_closed(self, endpoint: str) -> bool:
        """True if this endpoint answers, as far as is known."""
        breaker = self._breakers.get(endpoint)
        return breaker is not None and breaker.is_closed

    def statistics(self) -> tuple[EndpointStatistics, ...]:
        """Return a snapshot of each endpoint."""
        now_s = trio.current_time()
        return tuple(
            EndpointStatistics(
                endpoint,
                breaker.state,
                None if breaker.since_s == -math.inf else now_s - breaker.since_s,
                breaker.last_error,
            )
            for endpoint, breaker in self._breakers.items()
        )

    async def wait_usable(self, endpoints: Sequence[str], what: str, *, may_wait: bool) -> list[Ask]:
        """Return the endpoints to ask, the best first: all that answer, or else one as the probe.

        While neither is to be had: waits, or raises GlanceUnavailable at once unless it may wait.
        """
        self._know(endpoints)
        if asks := self._free(endpoints):
            return asks
        with trio.move_on_after(WAIT_MAX_S if may_wait else 0):
            self._waiting += 1
            try:
                while True:
                    self._know(endpoints)
                    if asks := self._free(endpoints):
                        return asks
                    if probe := self._probe_nowait(endpoints):
                        return [probe]
                    with trio.move_on_at(min(self._breakers[one].probe_at_s for one in endpoints)):
                        await self._changed.wait()
            finally:
                self._waiting -= 1
        errors = {self._breakers[endpoint].last_error for endpoint in endpoints}
        raise GlanceUnavailable(f"{what}: no Glance answers: {'; '.join(sorted(map(str, errors)))}")

    async def wait_recovered(self) -> None:
        """Wait until an endpoint that did not answer does again."""
        await self._recovered.wait()

    async def wait_forgotten_probe(self) -> Ask:
        """Return, once its pause is over and nobody waits who would be it, the probe of an endpoint."""
        while True:
            if not self._waiting and (probe := self._probe_nowait(self._breakers)):
                return probe
            soonest_s = min((breaker.probe_at_s for breaker in self._breakers.values()), default=math.inf)
            with trio.move_on_at(max(soonest_s, trio.current_time() + PAUSE_MIN_S)):
                await self._changed.wait()

    @contextmanager
    def attempt(self, ask: Ask, what: str) -> Iterator[None]:
        """Ask inside the block: to leave it is an answer, to raise GlanceUnavailable is none."""
        breaker = ask.breaker
        began_s, state_before = trio.current_time(), breaker.state
        try:
            yield
        except GlanceUnavailable as exc:
            was_down = self.is_down
            # What was asked says nothing of the endpoint.
            error = str(exc).removeprefix(f"{what}: ")
            breaker.failed(trio.current_time(), error, is_probe=ask.is_probe)
            self.avoid(ask.endpoint)
            if self.is_down and not was_down:
                logger.warning("no Glance answers; it is asked again until one does: %s", error)
            raise
        except trio.Cancelled:
            if trio.current_time() - began_s >= HANGING_AFTER_S:
                self.avoid(ask.endpoint)
            raise
        else:
            self._answered(ask.endpoint, breaker)
        finally:
            # Without an outcome somebody else must be the probe.
            if ask.is_probe:
                breaker.probe_ended(trio.current_time())
            if breaker.state != state_before:
                self._changed.set()
                self._changed = trio.Event()

    def avoid(self, endpoint: str) -> None:
        """Ask this endpoint after the others for a while: its answer was not a good one."""
        self._avoided_until[endpoint] = trio.current_time() + AVOIDED_S

    def _free(self, endpoints: Sequence[str]) -> list[Ask]:
        """Return those that may be asked freely, the best first."""
        closed = [endpoint for endpoint in endpoints if self._breakers[endpoint].is_closed]
        if self._avoided_until:
            now_s = trio.current_time()
            closed.sort(key=lambda endpoint: self._avoided_until.get(endpoint, -math.inf) > now_s)
        return [Ask(endpoint, False, self._breakers[endpoint]) for endpoint in closed]

    def _probe_nowait(self, endpoints: Iterable[str]) -> Ask | None:
        """Return an endpoint whose pause is over, to be asked once by who called."""
        now_s = trio.current_time()
        for endpoint in endpoints:
            breaker = self._breakers[endpoint]
            if not breaker.is_closed and breaker.may_ask(now_s):
                return Ask(endpoint, True, breaker)
        return None

    def _answered(self, endpoint: str, breaker: Breaker) -> None:
        was_closed, since_s = breaker.is_closed, breaker.since_s
        breaker.answered(trio.current_time())
        if not was_closed:
            logger.info("%s answers again, after %.1f s", endpoint, trio.current_time() - since_s)
            self._recovered.set()
            self._recovered = trio.Event()
            self._avoided_until.pop(endpoint, None)

    def _know(self, endpoints: Sequence[str]) -> None:
        if self._breakers.keys() == set(endpoints):
            return
        # Another login may name others; of those that stay what is known stays.
        failures_max = FAILURES_MAX if len(endpoints) == 1 else FAILURES_BESIDE_OTHERS_MAX
        self._breakers = {
            endpoint: self._breakers.get(endpoint) or Breaker(failures_max, PAUSE_MIN_S, self._pause_max_s)
            for endpoint in endpoints
        }
        self._avoided_until = {
            one: until for one, until in self._avoided_until.items() if one in self._breakers
        }
