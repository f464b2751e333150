"""What a reply of Glance's means, judged from its status and headers.

Pure.  Guards "never a wrong byte": nothing passes here that is not exactly what was asked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from lazyimg.errors import (
    GlanceUnavailable,
    ImageForbidden,
    ImageNotFound,
    LazyImgError,
    RangesNotSupported,
    SourceDoubted,
    WholeBody,
)

# A server that asks for a longer pause than this is asked again after it.
RETRY_AFTER_S_MAX = 3600.0

# RFC 9110 §14.4.  19 digits hold every offset a file can have.
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_MD5_HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)
_LENGTH = re.compile(r"\d{1,19}", re.ASCII)
_SECONDS = re.compile(r"\d{1,9}", re.ASCII)


def check_range(
    status: int, headers: Mapping[str, str], start: int, stop: int, size_bytes: int, what: str
) -> None:
    """Pass only the reply whose body is `[start, stop)` of `size_bytes`.

    Raises WholeBody for the whole image, GlanceUnavailable for anything else (204 and empty is how Glance
    tells that the store lost the file).
    """
    length = _content_length(headers, what)
    asked = f"bytes {start}-{stop - 1} of {size_bytes}"
    if status == 200 and length in (None, size_bytes):
        raise WholeBody(f"{what}: asked for {asked}, Glance sends the whole image")
    if status != 206:
        raise GlanceUnavailable(f"{what}: asked for {asked}, Glance answered {status}")
    if length == size_bytes != stop - start:
        # Whatever Content-Range says: some old releases sent the whole image and called it the range.
        raise WholeBody(f"{what}: asked for {asked}, Glance sends the whole image as 206")
    if length not in (None, stop - start):
        raise GlanceUnavailable(f"{what}: asked for {asked}, Glance announces {length} bytes")
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if (
        match is None
        or (int(match[1]), int(match[2])) != (start, stop - 1)
        or match[3] not in ("*", str(size_bytes))
    ):
        shown = headers.get("content-range", "no Content-Range")[:80]
        raise GlanceUnavailable(f"{what}: asked for {asked}, Glance sends {shown!r}")


def check_stream(status: int, headers: Mapping[str, str], size_bytes: int, what: str) -> None:
    """Pass only the reply whose body is the whole source; else raise GlanceUnavailable."""
    length = _content_length(headers, what)
    if status != 200 and not (status == 204 and size_bytes == 0):
        raise GlanceUnavailable(f"{what}: Glance answered {status} where all {size_bytes} bytes were asked")
    if length not in (None, size_bytes):
        raise GlanceUnavailable(f"{what}: Glance announces {length} of {size_bytes} bytes")


def check_content(headers: Mapping[str, str], checksum: str | None, what: str) -> None:
    """Raise SourceDoubted if the reply says that its bytes are of other content.

    checksum: the image's own, MD5 in hex.  Glance sends that of the whole image in Content-MD5, whatever range is
    asked (glance.common.wsgi and api.v2.image_data), which RFC 1864 never meant; so only 32 hex digits count.
    """
    sent = headers.get("content-md5", "").lower()
    if checksum and _MD5_HEX.fullmatch(sent) and sent != checksum.lower():
        raise SourceDoubted(
            f"{what}: Glance sends bytes of an image whose checksum is {sent}, not {checksum}"
        )


def refusal(status: int, headers: Mapping[str, str], body: bytes, what: str) -> LazyImgError:
    """Return what a reply other than 2xx means; `body` is its beginning.

    Only 403 and 404 are final, and 400 where it says that the store cannot do ranges.
    """
    if status == 404:
        return ImageNotFound(
            f"{what}: Glance does not have it or does not show it to these credentials; check the id"
        )
    if status == 403:
        return ImageForbidden(
            f"{what}: Glance refuses it to these credentials, or it is deactivated; ask its owner"
        )
    if status == 400 and b"not supported" in body.lower():
        return RangesNotSupported(f"{what}: its store cannot serve ranges")
    if status == 401:
        return GlanceUnavailable(
            f"{what}: Glance does not accept a token just issued (401); does it reach Keystone?"
        )
    if 300 <= status < 400:
        return GlanceUnavailable(
            f"{what}: Glance redirects ({status}), which is not followed; give the final address as endpoint"
        )
    return GlanceUnavailable(f"{what}: Glance answered {status}", retry_after_s=_retry_after_s(headers))


def has_length(headers: Mapping[str, str]) -> bool:
    """True when the reply announces how long its body is."""
    return "content-length" in headers


def _content_length(headers: Mapping[str, str], what: str) -> int | None:
    text = headers.get("content-length")
    if text is None:
        return None
    if not _LENGTH.fullmatch(text):
        raise GlanceUnavailable(f"{what}: Glance announces {text[:40]!r} bytes")
    return int(text)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return Retry-After in seconds from now (RFC 9110 §10.2.3: seconds or a date), None if there is none."""
    text = headers.get("retry-after", "").strip()
    if _SECONDS.fullmatch(text):
        return min(float(text), RETRY_AFTER_S_MAX)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return min(max((when - datetime.now(UTC)).total_seconds(), 0.0), RETRY_AFTER_S_MAX)
