"""From a GET to a reply worth reading: log in, choose an endpoint, ask again where that helps within one attempt.

That is: the next endpoint when one does not answer, once more with a new token after a 401, and a second time in
parallel when a request that a guest waits for is slower than nearly all lately were.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

import trio

from lazyimg.core.hedging import Hedging
from lazyimg.errors import GlanceUnavailable, LazyImgError
from lazyimg.glance.auth import Access, Auth
from lazyimg.glance.connections import Connections, Reply
from lazyimg.glance.endpoints import Ask, Endpoints, EndpointStatistics
from lazyimg.glance.race import race
from lazyimg.glance.replies import refusal

# Largest body of a refusal that is looked at.
ERROR_BYTES_MAX = 64 << 10
# Longest time for a body that is read whole, however steadily it drips.
WHOLE_READ_TIMEOUT_S = 60.0
# What a gateway says of the server behind it: nobody there, overloaded, silent.  Other 5xx are about what was asked.
NOT_AN_ANSWER = frozenset({502, 503, 504})


@dataclass(frozen=True, slots=True)
class Get:
    """One request.

    what: names the object in errors.  may_wait: for an endpoint that answers, if none does.  is_urgent: a guest waits.
    """

    path: str
    what: str
    headers: Mapping[str, str] = field(default_factory=dict)
    may_wait: bool = False
    is_urgent: bool = False


# Asked of an endpoint to learn whether it works, with the token: so Keystone and the database are asked too.  Not an
# image's bytes: those of one may hang in its store, which must not keep the others waiting.
PROBE_PATH = "/v2/images?limit=1"


@dataclass(frozen=True, slots=True)
class GlanceStatistics:
    """A snapshot; hedges: requests sent a second time, hedges_won: of these, the second was answered first.

    is_down: nothing can be had of Glance now, as far as is known.  login_error: why nobody can log in, or None.
    """

    is_down: bool
    login_error: str | None
    endpoints: tuple[EndpointStatistics, ...]
    hedges: int
    hedges_won: int


class Asking:
    """Sends requests to whichever endpoint answers; hedge: slow ones that are urgent may be sent twice."""

    def __init__(self, auth: Auth, connections: Connections, endpoints: Endpoints, *, hedge: bool) -> None:
        self._auth = auth
        self._connections = connections
        self._endpoints = endpoints
        self._hedging = Hedging() if hedge else None
        self._hedges = 0
        self._hedges_won = 0
        # The last one that was given, the last one that Glance refused, and what kept us from getting another.
        self._access: Access | None = None
        self._refused: Access | None = None
        self._login_error: LazyImgError | None = None

    @property
    def is_down(self) -> bool:
        return self._login_error is not None or self._endpoints.is_down

    def statistics(self) -> GlanceStatistics:
        """Return a snapshot of what is known of Glance and Keystone."""
        login_error = None if self._login_error is None else str(self._login_error)
        endpoints = self._endpoints.statistics()
        return GlanceStatistics(self.is_down, login_error, endpoints, self._hedges, self._hedges_won)

    async def keep_probing(self) -> None:
        """Ask endpoints that do not answer again, also while nobody needs them; runs until cancelled."""
        while True:
            ask = await self._endpoints.wait_forgotten_probe()
            assert self._access is not None
            # The endpoint's breaker notes how it went.
            with suppress(GlanceUnavailable):
                # A token that has ended is good enough: to be refused is an answer.
                await self._probe(ask, self._access, "probe")

    @asynccontextmanager
    async def reply(self, get: Get) -> AsyncIterator[Reply]:
        """Give a 2xx reply, its body unread; raise what any other status means."""
        access = await self._log_in(self._auth.access())
        async with AsyncExitStack() as stack:
            endpoint, reply = await self._first_answer(stack, access, get)
            if reply.status_code == 401:
                self._refused = access
                await stack.aclose()
                access = await self._log_in(self._auth.renew(access))
                endpoint, reply = await self._first_answer(stack, access, get)
            if reply.status_code != 401:
                self._refused = self._login_error = None
            if not reply.is_success:
                body = await self.beginning(reply, ERROR_BYTES_MAX, get.what)
                raise refusal(reply.status_code, reply.headers, body, get.what)
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise GlanceUnavailable(f"{get.what}: Glance sent an encoding that was not asked for")
            try:
                yield reply
            except GlanceUnavailable:
                # Its body was short, silent or not what was asked: another endpoint may do better next time.
                self._endpoints.avoid(endpoint)
                raise

    def pieces(self, reply: Reply, what: str) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives; every failure on the way becomes GlanceUnavailable."""
        return self._connections.pieces(reply, what)

    async def beginning(self, reply: Reply, bytes_max: int, what: str) -> bytes:
        """Return at most `bytes_max` of the body's bytes."""
        body = bytearray()
        with trio.move_on_after(WHOLE_READ_TIMEOUT_S) as scope:
            async with aclosing(self.pieces(reply, what)) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) >= bytes_max:
                        break
        if scope.cancelled_caught:
            raise GlanceUnavailable(f"{what}: Glance's answer took more than {WHOLE_READ_TIMEOUT_S:g} s")
        return bytes(body[:bytes_max])

    async def _log_in(self, access: Awaitable[Access]) -> Access:
        try:
            self._access = got = await access
        except LazyImgError as exc:
            self._login_error = exc
            raise
        # The old token is still given while it cannot be renewed, which is no login.
        if got is not self._refused:
            self._login_error = None
        return got

    async def _first_answer(self, stack: AsyncExitStack, access: Access, get: Get) -> tuple[str, Reply]:
        """Return the first endpoint that works, and its reply, which the stack closes."""
        left = await self._endpoints.wait_usable(access.endpoints, get.what, may_wait=get.may_wait)
        while left[0].is_probe and get.may_wait:
            await self._probe(left[0], access, get.what)
            left = await self._endpoints.wait_usable(access.endpoints, get.what, may_wait=get.may_wait)
        while True:
            ask = left.pop(0)
            try:
                if self._hedging is not None and get.is_urgent and not ask.is_probe:
                    ask, reply = await self._ask_again_if_slow(self._hedging, ask, left, access, get)
                else:
                    reply = await self._ask(ask, access, get)
            except GlanceUnavailable:
                if not left:
                    raise
                continue
            stack.push_async_callback(reply.aclose)
            return ask.endpoint, reply

    async def _probe(self, ask: Ask, access: Access, what: str) -> None:
        """Find out whether an endpoint answers.  Raises GlanceUnavailable."""
        reply = await self._ask(ask, access, Get(PROBE_PATH, what))
        await reply.aclose()

    async def _ask_again_if_slow(
        self, hedging: Hedging, first: Ask, others: list[Ask], access: Access, get: Get
    ) -> tuple[Ask, Reply]:
        """Ask one endpoint; if it is slower than it nearly always is, another too, or the same once more.

        Whom it asked is taken from `others`.
        """

        def second() -> Ask | None:
            if not self._endpoints.is_closed(first.endpoint) or not hedging.take():
                return None
            self._hedges += 1
            return others.pop(0) if others else first

        began_s = trio.current_time()
        hedging.asked()
        if hedging.delay_s is None:
            ask, reply, is_second = first, await self._ask(first, access, get), False
        else:
            ask, reply, is_second = await race(
                lambda one: self._ask(one, access, get), first, hedging.delay_s, second
            )
        hedging.answered(trio.current_time() - began_s)
        self._hedges_won += is_second
        return ask, reply

    async def _ask(self, ask: Ask, access: Access, get: Get) -> Reply:
        """Return what one endpoint answers, below 500; to say that nobody is there is no answer."""
        with self._endpoints.attempt(ask, get.what):
            reply = await self._connections.send(access, ask.endpoint, get.path, get.what, get.headers)
            if reply.status_code in NOT_AN_ANSWER:
                await reply.aclose()
                raise refusal(reply.status_code, reply.headers, b"", get.what)
        if reply.status_code >= 500:
            self._endpoints.avoid(ask.endpoint)
            await reply.aclose()
            raise refusal(reply.status_code, reply.headers, b"", get.what)
        return reply
