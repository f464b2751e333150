"""What replies and records mean: pure judgement, no socket."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from lazyimg.errors import (
    GlanceUnavailable,
    ImageForbidden,
    ImageNotFound,
    LazyImgError,
    RangesNotSupported,
    SourceDoubted,
    WholeBody,
)
from lazyimg.glance.client import LIST_PAGE_IMAGES
from lazyimg.glance.records import BadRecord, parse_json, parse_list, parse_record
from lazyimg.glance.replies import RETRY_AFTER_S_MAX, check_content, check_range, check_stream, refusal

SIZE = 1000
GOOD = {"content-range": "bytes 100-199/1000", "content-length": "100"}


def judge(status: int, headers: dict[str, str]) -> None:
    """Judge a reply to a request for [100, 200) of SIZE."""
    check_range(status, headers, 100, 200, SIZE, "image x")


MD5 = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("headers", "checksum"),
    [
        ({"content-md5": MD5}, MD5),
        ({"content-md5": MD5.upper()}, MD5),
        ({}, MD5),
        ({"content-md5": "f" * 32}, None),
        # As RFC 1864 has it: of the body, in base64.
        ({"content-md5": "Q2hlY2sgSW50ZWdyaXR5IQ=="}, MD5),
    ],
)
def test_content_that_may_be_the_images_passes(headers: dict[str, str], checksum: str | None) -> None:
    """A Content-MD5 that is the image's checksum, or says nothing of it, is no objection."""
    check_content(headers, checksum, "image x")


def test_content_of_another_image_is_doubted() -> None:
    """[I1] Glance sends the whole image's checksum with each range; another one's is another image's."""
    with pytest.raises(SourceDoubted, match=f"whose checksum is {'f' * 32}, not {MD5}"):
        check_content({"content-md5": "f" * 32}, MD5, "image x")


@pytest.mark.parametrize(
    "headers",
    [GOOD, {"content-range": "bytes 100-199/1000"}, GOOD | {"content-range": "bytes 100-199/*"}],
)
def test_exact_range_passes(headers: dict[str, str]) -> None:
    """206, the range asked, the length asked or none announced."""
    judge(206, headers)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (204, {}),
        (202, GOOD),
        (200, {"content-length": "100"}),
        (206, {}),
        (206, {"content-length": "100"}),
        (206, GOOD | {"content-length": "99"}),
        (206, GOOD | {"content-length": "101"}),
        (206, GOOD | {"content-length": "-1"}),
        (206, GOOD | {"content-length": "100, 100"}),
        (206, GOOD | {"content-range": "bytes 101-200/1000"}),
        (206, GOOD | {"content-range": "bytes 100-200/1000"}),
        (206, GOOD | {"content-range": "bytes 100-199/1001"}),
        (206, GOOD | {"content-range": "bytes */1000"}),
        (206, GOOD | {"content-range": "bytes 100-199/1000, bytes 100-199/1000"}),
        (206, GOOD | {"content-range": "bytes \u0661\u0660\u0660-199/1000"}),
    ],
)
def test_anything_else_is_a_passing_fault(status: int, headers: dict[str, str]) -> None:
    """Short, long, shifted, empty or unclear: never bytes, and no whole body either."""
    with pytest.raises(GlanceUnavailable, match="image x") as caught:
        judge(status, headers)
    assert not isinstance(caught.value, WholeBody)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {}),
        (200, {"content-length": "1000"}),
        (206, {"content-length": "1000"}),
        # Old releases: everything, under the range that was asked.
        (206, {"content-length": "1000", "content-range": "bytes 100-199/1000"}),
        (206, {"content-length": "1000", "content-range": "bytes 0-999/1000"}),
    ],
)
def test_whole_body_is_told_apart(status: int, headers: dict[str, str]) -> None:
    """Three of these in a row mean something, so they have a type of their own."""
    with pytest.raises(WholeBody):
        judge(status, headers)


def test_whole_image_as_range() -> None:
    """All bytes asked as a range: 206 is a range like any other, 200 is a whole body."""
    headers = {"content-range": "bytes 0-999/1000", "content-length": "1000"}
    check_range(206, headers, 0, SIZE, SIZE, "image x")
    with pytest.raises(WholeBody):
        check_range(200, {"content-length": "1000"}, 0, SIZE, SIZE, "image x")


@pytest.mark.parametrize(
    ("status", "headers"), [(204, {}), (206, {"content-length": "1000"}), (200, {"content-length": "999"})]
)
def test_stream_must_be_the_whole_image(status: int, headers: dict[str, str]) -> None:
    """Anything that is not announced as all of it is refused."""
    with pytest.raises(GlanceUnavailable):
        check_stream(status, headers, SIZE, "image x")
    check_stream(200, {"content-length": "1000"}, SIZE, "image x")
    check_stream(200, {}, SIZE, "image x")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b"Getting images randomly from this store is not supported. Offset: 0", RangesNotSupported),
        (400, b"bad request", GlanceUnavailable),
        (401, b"", GlanceUnavailable),
        (403, b"", ImageForbidden),
        (404, b"not supported", ImageNotFound),
        (302, b"", GlanceUnavailable),
        (416, b"not supported", GlanceUnavailable),
        (429, b"", GlanceUnavailable),
        (500, b"not supported", GlanceUnavailable),
        (503, b"", GlanceUnavailable),
    ],
)
def test_refusal_says_what_can_be_done(status: int, body: bytes, kind: type[LazyImgError]) -> None:
    """Only 403 and 404 are final."""
    error = refusal(status, {}, body, "image x")
    assert type(error) is kind
    assert "image x" in str(error)
    assert "\n" not in str(error)


def test_retry_after_is_seconds_or_a_date() -> None:
    """What is unclear is ignored, what is absurd is cut, what is past is now."""

    def asked(text: str) -> float | None:
        error = refusal(503, {"retry-after": text}, b"", "image x")
        assert isinstance(error, GlanceUnavailable)
        return error.retry_after_s

    assert asked("7") == 7
    assert asked("999999999") == RETRY_AFTER_S_MAX
    for unclear in ("", "soon", "-1", "1.5", "9" * 400):
        assert asked(unclear) is None
    soon = asked(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert soon is not None
    assert 50 < soon <= 60
    assert asked("Wed, 21 Oct 2015 07:28:00 GMT") == 0


FIRST, SECOND = (f"00000000-0000-4000-8000-00000000000{number}" for number in (1, 2))
FIELDS = {"id": FIRST, "status": "active", "size": 5, "name": "n", "disk_format": "raw"}


def test_record_keeps_only_string_properties() -> None:
    """API fields, numbers, lists and what no file name can hold are not properties."""
    record = parse_record(
        FIELDS | {"kernel_id": "k", "tags": ["t"], "os_hidden": True, "owner": "o", "odd": "\ud800", "n": 1}
    )
    assert record.properties == {"kernel_id": "k"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", "i"), ("id", "../../etc/passwd"), ("id", FIRST + "\n"), ("id", FIRST.replace("-", "")),
        ("status", "active\n"), ("disk_format", "raw\x1b[2J"), ("checksum", "\x00"), ("name", "\udcff"),
        ("id", None), ("id", ""), ("id", 3), ("id", "\ud800"), ("id", "i" * 5000), ("status", None),
        ("size", -1), ("size", True), ("size", 1.0), ("size", "5"), ("size", 1 << 63), ("virtual_size", []),
        ("min_disk", "1"), ("name", {}), ("os_hash_value", 1), ("checksum", []), ("disk_format", False),
    ],
)  # fmt: skip
def test_field_of_another_type_is_named(field: str, value: Any) -> None:
    """A hostile record is refused with the field's name."""
    with pytest.raises(BadRecord, match=field):
        parse_record(FIELDS | {field: value})


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"size": ' + b"9" * 5000 + b"}",
     b'{"images": [' + b"[]," * 1_000_000 + b"[]]}", b'{"a":' * 100_000, b'{"a": NaN, "b": ' + b'{"c":[' * 500]
)  # fmt: skip
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    """Empty, cut, of another type, nested without end, or a number without end."""
    with pytest.raises(BadRecord):
        parse_json(body)


def test_answer_of_many_values_costs_no_memory() -> None:
    """[I5] Eight megabytes of brackets would become two hundred; they are counted before they are parsed."""
    body = b'{"images": [' + b"[]," * 2_700_000 + b"[]]}"
    tracemalloc.start()
    try:
        with pytest.raises(BadRecord, match="more than 200000 values"):
            parse_json(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_largest_page_of_real_records_is_no_flood() -> None:
    """A page as large as we ask for, with records of many properties, is far below the limit."""
    record = FIELDS | {f"property_{number}": "a, b, [c], {d}" for number in range(60)}
    body = json.dumps({"images": [record] * LIST_PAGE_IMAGES}).encode()
    assert len(parse_list(parse_json(body))[0]) == LIST_PAGE_IMAGES


@pytest.mark.parametrize(
    ("name", "shown"),
    [("a\nb", "a\ufffdb"), ("\x1b[2Jx", "\ufffd[2Jx"), ("\u202eabc", "\ufffdabc"), ("Ünï", "Ünï")],
)
def test_name_that_would_move_a_terminal_is_shown_as_signs(name: str, shown: str) -> None:
    """Line ends, escapes and what turns the direction of writing; a name is people's own and hides no image."""
    assert parse_record(FIELDS | {"name": name}).name == shown


def test_bad_record_does_not_hide_the_others(expected_warnings: Callable[..., None]) -> None:
    """It is left out of the list with a warning."""
    expected_warnings("left out: size", "left out: a JSON str")
    page = {
        "images": [FIELDS, FIELDS | {"size": "5"}, "x", FIELDS | {"id": SECOND}],
        "next": "/v2/images?marker=j",
    }
    records, following = parse_list(parse_json(json.dumps(page).encode()))
    assert [record.id for record in records] == [FIRST, SECOND]
    assert following == "/v2/images?marker=j"


@pytest.mark.parametrize("page", [{}, {"images": {}}, {"images": [], "next": 3}])
def test_page_of_another_shape_is_refused(page: dict[str, Any]) -> None:
    """A page without a list of images is not an empty list."""
    with pytest.raises(BadRecord):
        parse_list(page)
