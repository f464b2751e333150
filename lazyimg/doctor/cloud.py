"""Glance and Keystone: whether they answer, give ranges, and agree with this machine's clock."""

from __future__ import annotations

import email.utils
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.doctor.finding import Finding, fail, ok, warn
from lazyimg.errors import GlanceUnavailable, ImageForbidden, LazyImgError, RangesNotSupported, WholeBody
from lazyimg.glance.auth import Access, Auth

# Clocks that differ more make a token seem fresh, or expired, that is not.
SKEW_MAX_S = 30.0
DATE_TIMEOUT_S = 10.0
# Tokens are renewed three minutes before they end.
TOKEN_LIFE_MIN_S = 600.0

AskDate = Callable[[str, ssl.SSLContext | None], str | None]


class Glance(Protocol):
    """What is asked of Glance."""

    async def list_images(self) -> list[ImageRecord]: ...

    async def image(self, image_id: str) -> ImageRecord: ...

    def open_range(
        self, image_id: str, start: int, stop: int, *, size_bytes: int
    ) -> AbstractAsyncContextManager[AsyncIterator[bytes]]: ...


async def cloud_findings(
    auth: Auth, glance: Glance, *, server_date: AskDate, now_s: Callable[[], float] = time.time
) -> AsyncGenerator[Finding, None]:
    """Yield what is found, one after the other; what cannot be asked any more is left out.

    server_date: as the function below, which blocks.
    """
    try:
        access = await auth.access()
    except LazyImgError as exc:
        yield fail("credentials", str(exc), "see docs/configuration.md for endpoint and cloud")
        return
    yield _credentials(access, now_s())
    yield await _clock(access, server_date, now_s)
    try:
        records = await glance.list_images()
    except LazyImgError as exc:
        yield fail("Glance", str(exc), f"look from here: `curl {access.endpoints[0]}`")
        return
    yield ok("Glance", f"{access.endpoints[0]} shows {len(records)} images")
    readable = [one for one in records if one.status == "active" and one.size_bytes]
    if not readable:
        yield warn("ranges", "no image is active and has bytes", "upload one, then ask again")
        return
    # The newest: likely the one that is used next.
    yield await _ranges(glance, readable[0])


def _credentials(access: Access, now_s: float) -> Finding:
    if access.expires_at_s is None:
        return ok("credentials", "no token is needed, or it never ends")
    left_s = access.expires_at_s - now_s
    seen = f"a token for {left_s / 60:.0f} minutes"
    if left_s < TOKEN_LIFE_MIN_S:
        return warn("credentials", seen, "raise [token] expiration in Keystone, or set this machine's clock")
    return ok("credentials", seen)


async def _clock(access: Access, server_date: AskDate, now_s: Callable[[], float]) -> Finding:
    context = None if access.tls is None else access.tls.context
    try:
        text = await trio.to_thread.run_sync(
            server_date, access.endpoints[0], context, abandon_on_cancel=True
        )
        skew_s = email.utils.parsedate_to_datetime(text or "").timestamp() - now_s()
    except (OSError, ValueError) as exc:
        return warn("clock", f"Glance's could not be read: {exc}", "compare them by hand: `chronyc tracking`")
    seen = f"{abs(skew_s):.0f} s {'behind' if skew_s > 0 else 'ahead of'} Glance's"
    if abs(skew_s) > SKEW_MAX_S:
        return warn("clock", seen, "let both follow the same time server: tokens end by it")
    return ok("clock", seen)


async def _ranges(glance: Glance, record: ImageRecord) -> Finding:
    """Ask for one byte of an image, as a read does."""
    name, which = "ranges", f"image {record.id}"
    assert record.size_bytes
    try:
        await glance.image(record.id)
        at = record.size_bytes // 2
        async with glance.open_range(record.id, at, at + 1, size_bytes=record.size_bytes) as body:
            got = b"".join([part async for part in body])
    except RangesNotSupported:
        return warn(
            name,
            f"{which}: its store cannot serve them, so that it is read as one stream",
            "keep images that guests start from in a file store, or expect slow first starts",
        )
    except WholeBody:
        return warn(
            name, f"{which}: Glance sends all of it instead", "update Glance, or look at the proxy before it"
        )
    except ImageForbidden as exc:
        return fail(name, str(exc), "give these credentials the right to download images")
    except GlanceUnavailable as exc:
        return fail(name, str(exc), "see Glance's log, and its store's")
    except LazyImgError as exc:
        return fail(name, str(exc), "look with `openstack image show`")
    if len(got) != 1:
        return fail(name, f"{which}: {len(got)} bytes came for one", "look at the proxy before Glance")
    return ok(name, f"{which}: one byte was asked, and one came")


def server_date(url: str, tls: ssl.SSLContext | None) -> str | None:
    """Return the Date of whatever answers at `url`, an error too."""
    try:
        with urllib.request.urlopen(f"{url}/", timeout=DATE_TIMEOUT_S, context=tls) as answer:
            date: str | None = answer.headers.get("Date")
            return date
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.headers.get("Date")
