"""Glance's Image API v2 over HTTP/1.1: one attempt per call, typed errors.  Owner of httpx.

Guards "never a wrong byte": a reply counts only if status, Content-Range and length are exactly what was
asked, because real servers answer ranges with nothing, with less, or with everything.  It never retries a
failure; it only goes to the next endpoint when one is down, and asks once more with a new token after a 401.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    suppress,
)
from functools import lru_cache
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import trio

from lazyimg import __version__
from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, ImageNotFound
from lazyimg.glance.auth import Access, Auth, quiet_loggers, without_frames
from lazyimg.glance.records import BadRecord, parse_json, parse_list, parse_record
from lazyimg.glance.replies import check_range, check_stream, has_length, refusal

# Largest bodies read whole.  A record is 1 to 2 KB, with long properties some tens of KB.
RECORD_BYTES_MAX = 1 << 20
LIST_BYTES_MAX = 8 << 20
ERROR_BYTES_MAX = 64 << 10
# Images asked for per page of the list: parsing one takes about 3 ms of the event loop.
LIST_PAGE_IMAGES = 250
# Bounds of a list that does not end; no known cloud has near as many images.
LIST_PAGES_MAX = 1000
# Servers close idle connections after 5 s (Apache) or later; a closed one is noticed before it is used.
KEEPALIVE_S = 15.0
# A caller that gives up after this long without an answer has told us that the endpoint hangs.
HANGING_AFTER_S = 1.0
# Parsed URLs kept.
URLS_MAX = 1024
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": f"lazyimg/{__version__}"}
# Longest time for a body that is read whole, however steadily it drips.
WHOLE_READ_TIMEOUT_S = 60.0


class GlanceClient:
    """Asks Glance for records and bytes.  Use from one event loop; `aclose` when done.

    connect_timeout_s: for a connection.  first_byte_timeout_s: from there to the reply's headers.
    between_bytes_timeout_s: longest silence within a body.  connections_max: open at once; more calls wait.
    Every call may raise GlanceUnavailable, ConfigError or CredentialsRefused.  A cancelled call closes its
    connection and leaves the others as they are.
    """

    def __init__(
        self,
        auth: Auth,
        *,
        connect_timeout_s: float,
        first_byte_timeout_s: float,
        between_bytes_timeout_s: float,
        connections_max: int,
    ) -> None:
        self._auth = auth
        # httpx has one timeout for headers and body; ours are set around its calls, it keeps only connect.
        self._extensions = {"timeout": httpx.Timeout(None, connect=connect_timeout_s).as_dict()}
        self._headers_timeout_s = connect_timeout_s + first_byte_timeout_s
        self._between_bytes_timeout_s = between_bytes_timeout_s
        self._connections_max = connections_max
        # By scheme and host: a transport knows one proxy.
        self._transports: dict[str, httpx.AsyncHTTPTransport] = {}
        # The endpoint that answered last is asked first.
        self._good_endpoint: str | None = None
        quiet_loggers()

    async def aclose(self) -> None:
        """Close all connections; the client can be used again."""
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            await transport.aclose()

    async def image(self, image_id: str) -> ImageRecord:
        """Return Glance's record of the image.  Raises ImageNotFound or ImageForbidden too."""
        what = f"image {image_id}"
        fields = await self._json(f"/v2/images/{quote(image_id, safe='')}", what, RECORD_BYTES_MAX)
        try:
            record = parse_record(fields)
        except BadRecord as exc:
            raise GlanceUnavailable(f"{what}: Glance's record is unusable: {exc}") from exc
        if record.id != image_id:
            raise GlanceUnavailable(f"{what}: Glance sent the record of another image")
        return record

    async def list_images(self) -> list[ImageRecord]:
        """Return the records of all images these credentials can see, hidden ones too, newest first.

        A record that cannot be understood is left out with a warning, so that it does not hide the others.
        """
        records: dict[str, ImageRecord] = {}
        for hidden in ("false", "true"):
            query = {"visibility": "all", "os_hidden": hidden, "limit": str(LIST_PAGE_IMAGES)}
            query |= {"sort_key": "created_at", "sort_dir": "desc"}
            async for record in self._list(query):
                records.setdefault(record.id, record)
        return sorted(records.values(), key=lambda record: record.created_at, reverse=True)

    def open_range(
        self, image_id: str, start: int, stop: int, *, size_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask for `[start, stop)` of the source; entering gives its bytes in pieces as they arrive.

        size_bytes: the whole source's.  Together the pieces are exactly the range, or the iterator raises
        GlanceUnavailable after what came; they are never more.  Entering raises WholeBody when Glance sends
        the image whole, RangesNotSupported when its store cannot do ranges, ImageNotFound or ImageForbidden.
        """
        assert 0 <= start < stop <= size_bytes
        return self._open_range(image_id, start, stop, size_bytes)

    def open_stream(
        self, image_id: str, *, size_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask for the source from its first byte to its last, in pieces as they arrive.

        Together exactly size_bytes, or the iterator raises GlanceUnavailable after what came.  Entering
        raises as `open_range` does, but for WholeBody and RangesNotSupported.
        """
        return self._open_stream(image_id, size_bytes)

    @asynccontextmanager
    async def _open_range(
        self, image_id: str, start: int, stop: int, size_bytes: int
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        what = f"image {image_id} [{start}, {stop})"
        # HTTP's ranges include their last byte (RFC 9110 §14.1.2); ours end nowhere else but here.
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        async with self._reply(f"/v2/images/{quote(image_id, safe='')}/file", what, headers) as reply:
            check_range(reply.status_code, reply.headers, start, stop, size_bytes, what)
            async with aclosing(self._exactly(reply, stop - start, what)) as pieces:
                if has_length(reply.headers):
                    yield pieces
                else:
                    # Only the end of such a body tells whether it is the whole image from its first byte on,
                    # which old servers sent as 206.  Rare, and no longer than a request: so it is held back.
                    held = [piece async for piece in pieces]
                    async with aclosing(_replay(held)) as replayed:
                        yield replayed

    @asynccontextmanager
    async def _open_stream(
        self, image_id: str, size_bytes: int
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        what = f"image {image_id}"
        async with self._reply(f"/v2/images/{quote(image_id, safe='')}/file", what, {}) as reply:
            check_stream(reply.status_code, reply.headers, size_bytes, what)
            async with aclosing(self._exactly(reply, size_bytes, what)) as pieces:
                yield pieces

    async def _list(self, query: Mapping[str, str]) -> AsyncIterator[ImageRecord]:
        seen = set()
        for _ in range(LIST_PAGES_MAX):
            text = urlencode(query)
            if text in seen:
                raise GlanceUnavailable("list of images: Glance's pages lead back to an earlier one")
            seen.add(text)
            try:
                fields = await self._json(f"/v2/images?{text}", "list of images", LIST_BYTES_MAX)
                records, following = parse_list(fields)
            except (ImageNotFound, BadRecord) as exc:
                # Not found: the image that marked the page was deleted meanwhile.
                raise GlanceUnavailable(f"list of images: a page is unusable: {exc}") from exc
            for record in records:
                yield record
            if following is None:
                return
            # Only its query is taken: the host it names is not ours to send a token to.
            query = dict(parse_qsl(urlsplit(following).query))
        raise GlanceUnavailable(f"list of images: it has more than {LIST_PAGES_MAX} pages")

    async def _json(self, path: str, what: str, bytes_max: int) -> Mapping[str, object]:
        async with self._reply(path, what, {}) as reply:
            if reply.status_code != 200:
                raise GlanceUnavailable(f"{what}: Glance answered {reply.status_code}, not 200")
            body = await self._beginning(reply, bytes_max + 1, what)
        if len(body) > bytes_max:
            raise GlanceUnavailable(f"{what}: Glance's answer is longer than {bytes_max} bytes")
        try:
            return parse_json(body)
        except BadRecord as exc:
            raise GlanceUnavailable(f"{what}: Glance's answer is unusable: {exc}") from exc

    @asynccontextmanager
    async def _reply(self, path: str, what: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """Give a 2xx reply to GET, its body unread; raise what any other status means."""
        access = await self._auth.access()
        async with AsyncExitStack() as stack:
            endpoint, reply = await self._first_answer(stack, access, path, what, headers)
            if reply.status_code == 401:
                await stack.aclose()
                access = await self._auth.renew(access)
                endpoint, reply = await self._first_answer(stack, access, path, what, headers)
            if not reply.is_success:
                body = await self._beginning(reply, ERROR_BYTES_MAX, what)
                raise refusal(reply.status_code, reply.headers, body, what)
            if reply.headers.get("content-encoding", "identity") != "identity":
                raise GlanceUnavailable(f"{what}: Glance sent an encoding that was not asked for")
            try:
                yield reply
            except GlanceUnavailable:
                # Its body was short, silent or not what was asked: another endpoint may do better next time.
                self._turn_from(endpoint, access)
                raise

    async def _first_answer(
        self, stack: AsyncExitStack, access: Access, path: str, what: str, headers: Mapping[str, str]
    ) -> tuple[str, httpx.Response]:
        """Return the first endpoint that works, and its reply, which the stack closes."""
        endpoints = sorted(access.endpoints, key=lambda endpoint: endpoint != self._good_endpoint)
        for endpoint in endpoints:
            is_last = endpoint == endpoints[-1]
            try:
                reply = await self._send(access, endpoint, path, what, headers)
            except GlanceUnavailable:
                self._turn_from(endpoint, access)
                if is_last:
                    raise
                continue
            if reply.status_code < 500 or is_last:
                stack.push_async_callback(reply.aclose)
                if reply.status_code < 500:
                    self._good_endpoint = endpoint
                return endpoint, reply
            self._turn_from(endpoint, access)
            await reply.aclose()
        raise AssertionError("an Access has at least one endpoint")

    async def _send(
        self, access: Access, endpoint: str, path: str, what: str, headers: Mapping[str, str]
    ) -> httpx.Response:
        asked_at = trio.current_time()
        try:
            # Never anything but `identity`: the bytes of a compressed body would not be the image's.
            request = httpx.Request(
                "GET",
                _url(endpoint + path),
                headers={**access.headers, **headers, **_HEADERS},
                extensions=self._extensions,
            )
            with trio.move_on_after(self._headers_timeout_s):
                return await self._transport(access, request.url).handle_async_request(request)
            failure = f"no answer in {self._headers_timeout_s:g} s"
        except trio.Cancelled:
            if trio.current_time() - asked_at >= HANGING_AFTER_S:
                self._turn_from(endpoint, access)
            raise
        except (httpx.LocalProtocolError, UnicodeError):
            # Only the token can be at fault, and such an error quotes it: so it is not chained either.
            failure = "the token has characters that HTTP cannot carry"
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as exc:
            raise GlanceUnavailable(f"{what}: {endpoint}: {_failure(exc)}") from without_frames(exc)
        raise GlanceUnavailable(f"{what}: {endpoint}: {failure}")

    def _transport(self, access: Access, url: httpx.URL) -> httpx.AsyncHTTPTransport:
        """Return the connections to one server.

        httpx's client above it would follow redirects, keep cookies and log, none of which is wanted, and takes
        a quarter of what a request costs.
        """
        server = f"{url.scheme}://{url.netloc.decode()}"
        transport = self._transports.get(server)
        if transport is None:
            limits = httpx.Limits(
                max_connections=self._connections_max,
                max_keepalive_connections=self._connections_max,
                keepalive_expiry=KEEPALIVE_S,
            )
            # The system's certificates, where operators put their own, rather than those httpx ships.
            verify = access.tls or ssl.create_default_context()
            transport = httpx.AsyncHTTPTransport(verify=verify, limits=limits, proxy=_proxy_for(url))
            self._transports[server] = transport
        return transport

    def _turn_from(self, endpoint: str, access: Access) -> None:
        if self._good_endpoint in (endpoint, None) and len(access.endpoints) > 1:
            following = access.endpoints.index(endpoint) + 1
            self._good_endpoint = access.endpoints[following % len(access.endpoints)]

    async def _beginning(self, reply: httpx.Response, bytes_max: int, what: str) -> bytes:
        """Return at most `bytes_max` of the body's bytes."""
        body = bytearray()
        with trio.move_on_after(WHOLE_READ_TIMEOUT_S) as scope:
            async with aclosing(self._pieces(reply, what)) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) >= bytes_max:
                        break
        if scope.cancelled_caught:
            raise GlanceUnavailable(f"{what}: Glance's answer took more than {WHOLE_READ_TIMEOUT_S:g} s")
        return bytes(body[:bytes_max])

    async def _exactly(self, reply: httpx.Response, length: int, what: str) -> AsyncGenerator[bytes, None]:
        """Yield the body; raise GlanceUnavailable unless it is `length` bytes, and never yield more."""
        received = 0
        async with aclosing(self._pieces(reply, what)) as pieces:
            async for piece in pieces:
                received += len(piece)
                # The end is looked for before the last piece is handed out, so that the connection is free
                # for the next request even if the reader stops at its last byte.
                is_over = received > length or (received == length and bool(await anext(pieces, None)))
                if is_over:
                    yield piece[: len(piece) - (received - length)]
                    raise GlanceUnavailable(f"{what}: Glance sent more than {length} bytes")
                yield piece
        if received != length:
            raise GlanceUnavailable(f"{what}: Glance sent {received} of {length} bytes")

    async def _pieces(self, reply: httpx.Response, what: str) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives; every failure on the way becomes GlanceUnavailable."""
        raw = reply.aiter_raw()
        try:
            while True:
                with trio.move_on_after(self._between_bytes_timeout_s) as silence:
                    piece = await anext(raw, b"")
                if silence.cancelled_caught:
                    raise GlanceUnavailable(f"{what}: nothing came for {self._between_bytes_timeout_s:g} s")
                if not piece:
                    return
                yield piece
        except (httpx.HTTPError, httpx.StreamError) as exc:
            raise GlanceUnavailable(f"{what}: {_failure(exc)}") from without_frames(exc)
        finally:
            await reply.aclose()
            # httpx's iterators are nested generators that do not close one another.  On the closed connection
            # the innermost fails, which ends them all; else the garbage collector would have to, warning.
            with suppress(httpx.HTTPError, httpx.StreamError):
                while await anext(raw, b""):
                    pass


@lru_cache(maxsize=URLS_MAX)
def _url(text: str) -> httpx.URL:
    """Return a parsed URL; an image's is asked for again and again."""
    return httpx.URL(text)


def _proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names for this URL (http_proxy, https_proxy, no_proxy)."""
    if proxy_bypass(url.host):
        return None
    return getproxies().get(url.scheme)


async def _replay(pieces: list[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece


def _failure(exc: Exception) -> str:
    text = str(exc).splitlines()
    return f"{type(exc).__name__}: {text[0][:200]}" if text else type(exc).__name__
