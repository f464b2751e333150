"""Glance's Image API v2: one attempt per call, typed errors.

Guards "never a wrong byte": a reply counts only if status, Content-Range and length are exactly what was
asked, because real servers answer ranges with nothing, with less, or with everything.  It never retries a
failure; it only goes to the next endpoint when one is down, and asks once more with a new token after a 401.
While no endpoint answers, requests for bytes wait for the one probe that is out; others fail at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import GlanceUnavailable, ImageNotFound
from lazyimg.glance.asking import Asking, Get, GlanceStatistics
from lazyimg.glance.auth import Auth
from lazyimg.glance.connections import Connections, Reply
from lazyimg.glance.endpoints import Endpoints
from lazyimg.glance.records import BadRecord, parse_json, parse_list, parse_record
from lazyimg.glance.replies import check_content, check_range, check_stream, has_length

# Largest bodies read whole.  A record is 1 to 2 KB, with long properties some tens of KB.
RECORD_BYTES_MAX = 1 << 20
PAGE_BYTES_MAX = 8 << 20
# All pages together: some 60,000 records.
LIST_BYTES_MAX = 128 << 20
# Images asked for per page of the list: parsing one takes about 3 ms of the event loop.
LIST_PAGE_IMAGES = 250
# Bounds of a list that does not end; no known cloud has near as many images.
LIST_PAGES_MAX = 1000


class GlanceClient:
    """Asks Glance for records and bytes.  Use from one event loop; `aclose` when done.

    The times and connections_max are those of Connections.  retry_pause_max_s: longest pause before an endpoint that
    does not answer is probed again.  hedge: a slow request that a guest waits for may be sent twice.
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
        retry_pause_max_s: float = 5,
        hedge: bool = True,
    ) -> None:
        self._connections = Connections(
            connect_timeout_s=connect_timeout_s,
            first_byte_timeout_s=first_byte_timeout_s,
            between_bytes_timeout_s=between_bytes_timeout_s,
            connections_max=connections_max,
        )
        self._endpoints = Endpoints(pause_max_s=retry_pause_max_s)
        self._asking = Asking(auth, self._connections, self._endpoints, hedge=hedge)

    async def aclose(self) -> None:
        """Close all connections; the client can be used again."""
        await self._connections.aclose()

    @property
    def is_down(self) -> bool:
        """True while no endpoint answers, or nobody can log in: who cannot wait need not ask."""
        return self._asking.is_down

    def statistics(self) -> GlanceStatistics:
        """Return a snapshot of what is known of Glance and Keystone."""
        return self._asking.statistics()

    async def wait_recovered(self) -> None:
        """Wait until an endpoint that did not answer does again."""
        await self._endpoints.wait_recovered()

    async def keep_probing(self) -> None:
        """Ask endpoints that do not answer again, also while nobody needs them; runs until cancelled."""
        await self._asking.keep_probing()

    async def image(self, image_id: str) -> ImageRecord:
        """Return Glance's record of the image.  Raises ImageNotFound or ImageForbidden too."""
        what = f"image {image_id}"
        body = await self._body(f"/v2/images/{quote(image_id, safe='')}", what, RECORD_BYTES_MAX)
        try:
            record = parse_record(parse_json(body))
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
        self,
        image_id: str,
        start: int,
        stop: int,
        *,
        size_bytes: int,
        checksum: str | None = None,
        is_urgent: bool = False,
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask for `[start, stop)` of the source; entering gives its bytes in pieces as they arrive.

        size_bytes, checksum: the whole source's.  is_urgent: a guest waits for it.  Together the pieces are exactly
        the range, or the iterator raises GlanceUnavailable after what came; they are never more.  Entering raises
        SourceDoubted where Glance says that it sends other content, WholeBody when it sends the image whole,
        RangesNotSupported when its store cannot do ranges, ImageNotFound or ImageForbidden.
        """
        assert 0 <= start < stop <= size_bytes
        return self._open_range(image_id, start, stop, size_bytes, checksum, is_urgent)

    def open_stream(
        self, image_id: str, *, size_bytes: int, checksum: str | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """Ask for the source from its first byte to its last, in pieces as they arrive.

        Together exactly size_bytes, or the iterator raises GlanceUnavailable after what came.  Entering
        raises as `open_range` does, but for WholeBody and RangesNotSupported.
        """
        return self._open_stream(image_id, size_bytes, checksum)

    @asynccontextmanager
    async def _open_range(
        self, image_id: str, start: int, stop: int, size_bytes: int, checksum: str | None, is_urgent: bool
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        what = f"image {image_id} [{start}, {stop})"
        # HTTP's ranges include their last byte (RFC 9110 §14.1.2); ours end nowhere else but here.
        headers = {"Range": f"bytes={start}-{stop - 1}"}
        get = Get(_data_path(image_id), what, headers, may_wait=True, is_urgent=is_urgent)
        async with self._asking.reply(get) as reply:
            check_content(reply.headers, checksum, what)
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
        self, image_id: str, size_bytes: int, checksum: str | None
    ) -> AsyncGenerator[AsyncIterator[bytes], None]:
        what = f"image {image_id}"
        async with self._asking.reply(Get(_data_path(image_id), what, may_wait=True)) as reply:
            check_content(reply.headers, checksum, what)
            check_stream(reply.status_code, reply.headers, size_bytes, what)
            async with aclosing(self._exactly(reply, size_bytes, what)) as pieces:
                yield pieces

    async def _list(self, query: Mapping[str, str]) -> AsyncIterator[ImageRecord]:
        seen = set()
        left_bytes = LIST_BYTES_MAX
        for _ in range(LIST_PAGES_MAX):
            text = urlencode(query)
            if text in seen:
                raise GlanceUnavailable("list of images: Glance's pages lead back to an earlier one")
            seen.add(text)
            try:
                page_bytes_max = min(PAGE_BYTES_MAX, left_bytes)
                body = await self._body(f"/v2/images?{text}", "list of images", page_bytes_max)
                left_bytes -= len(body)
                records, following = parse_list(parse_json(body))
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

    async def _body(self, path: str, what: str, bytes_max: int) -> bytes:
        """Return a body whole."""
        async with self._asking.reply(Get(path, what)) as reply:
            if reply.status_code != 200:
                raise GlanceUnavailable(f"{what}: Glance answered {reply.status_code}, not 200")
            body = await self._asking.beginning(reply, bytes_max + 1, what)
        if len(body) > bytes_max:
            raise GlanceUnavailable(f"{what}: Glance's answer is longer than {bytes_max} bytes")
        return body

    async def _exactly(self, reply: Reply, length: int, what: str) -> AsyncGenerator[bytes, None]:
        """Yield the body; raise GlanceUnavailable unless it is `length` bytes, and never yield more."""
        received = 0
        async with aclosing(self._asking.pieces(reply, what)) as pieces:
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


def _data_path(image_id: str) -> str:
    return f"/v2/images/{quote(image_id, safe='')}/file"


async def _replay(pieces: list[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece
