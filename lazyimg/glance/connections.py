"""HTTP/1.1 connections to Glance: one request, its headers, its body, each with a time limit.  Owner of httpx.

Every failure on the way is a GlanceUnavailable; no error, log line or traceback of httpx's carries a token.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from functools import lru_cache
from urllib.request import getproxies, proxy_bypass

import httpx
import trio

from lazyimg import __version__
from lazyimg.errors import GlanceUnavailable
from lazyimg.glance.auth import Access, quiet_loggers, without_frames
from lazyimg.glance.tls import Tls

# Servers close idle connections after 5 s (Apache) or later; a closed one is noticed before it is used.
KEEPALIVE_S = 15.0
# Parsed URLs kept.
URLS_MAX = 1024
_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": f"lazyimg/{__version__}"}

# A reply: `status_code`, `headers`, `is_success`, `aclose`; its body comes from `Connections.pieces`.
Reply = httpx.Response


class Connections:
    """Connections to all servers, kept open between requests.

    connect_timeout_s: for a connection.  first_byte_timeout_s: from there to the reply's headers.
    between_bytes_timeout_s: longest silence within a body.  connections_max: open at once; more calls wait.
    """

    def __init__(
        self,
        *,
        connect_timeout_s: float,
        first_byte_timeout_s: float,
        between_bytes_timeout_s: float,
        connections_max: int,
    ) -> None:
        # httpx has one timeout for headers and body; ours are set around its calls, it keeps only connect.
        self._extensions = {"timeout": httpx.Timeout(None, connect=connect_timeout_s).as_dict()}
        self._headers_timeout_s = connect_timeout_s + first_byte_timeout_s
        self._between_bytes_timeout_s = between_bytes_timeout_s
        self._connections_max = connections_max
        # By scheme and host: a transport knows one proxy.
        self._transports: dict[str, httpx.AsyncHTTPTransport] = {}
        # What those trust whose access says nothing of it: the system's authorities.
        self._default_tls: Tls | None = None
        self._reading_files = trio.CapacityLimiter(1)
        quiet_loggers()

    async def aclose(self) -> None:
        """Close all connections; they can be used again."""
        transports, self._transports = self._transports, {}
        for transport in transports.values():
            await transport.aclose()

    async def send(
        self, access: Access, endpoint: str, path: str, what: str, headers: Mapping[str, str]
    ) -> Reply:
        """Send a GET and return the reply, its body unread; the caller closes it."""
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
        except (httpx.LocalProtocolError, UnicodeError):
            # Only the token can be at fault, and such an error quotes it: so it is not chained either.
            failure = "the token has characters that HTTP cannot carry"
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as exc:
            if isinstance(_root(exc), ssl.SSLError):
                await trio.to_thread.run_sync(self._tls(access).reload, limiter=self._reading_files)
            raise GlanceUnavailable(f"{what}: {endpoint}: {_failure(exc)}") from without_frames(exc)
        raise GlanceUnavailable(f"{what}: {endpoint}: {failure}")

    async def pieces(self, reply: Reply, what: str) -> AsyncGenerator[bytes, None]:
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
            verify = self._tls(access).context if url.scheme == "https" else False
            transport = httpx.AsyncHTTPTransport(verify=verify, limits=limits, proxy=_proxy_for(url))
            self._transports[server] = transport
        return transport

    def _tls(self, access: Access) -> Tls:
        if access.tls is not None:
            return access.tls
        self._default_tls = self._default_tls or Tls()
        return self._default_tls


@lru_cache(maxsize=URLS_MAX)
def _url(text: str) -> httpx.URL:
    """Return a parsed URL; an image's is asked for again and again."""
    return httpx.URL(text)


def _proxy_for(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names for this URL (http_proxy, https_proxy, no_proxy)."""
    if proxy_bypass(url.host):
        return None
    return getproxies().get(url.scheme)


def _root(exc: BaseException) -> BaseException:
    """Return what the system or OpenSSL said, which the libraries above leave out of their text; else `exc`."""
    cause: BaseException | None = exc
    # No chain of theirs is near as long.
    for _ in range(10):
        if cause is None or isinstance(cause, OSError):
            break
        cause = cause.__cause__ or cause.__context__
    return cause if isinstance(cause, OSError) else exc


def _failure(exc: Exception) -> str:
    root = _root(exc)
    text = str(exc).splitlines() or str(root).splitlines()
    return f"{type(exc).__name__}: {text[0][:200]}" if text else type(exc).__name__
