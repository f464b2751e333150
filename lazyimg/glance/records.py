"""Glance's JSON turned into image records; every field of it may be anything.

Pure.  Image API reference, "Show image" and "List images".
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping

from lazyimg.core.identity import ImageRecord, is_image_id

logger = logging.getLogger(__name__)

# No file is longer: off_t.
SIZE_BYTES_MAX = (1 << 63) - 1
# Glance's own columns hold 255 characters; the list of pages is told by its next link.
TEXT_LENGTH_MAX = 4096
# Values in one answer, guessed from its punctuation before it is parsed: a record has some 60, a page of the list
# 250 records; of nothing but "[]," an answer of 8 MiB would become 200 MB.
VALUES_MAX = 200_000

# The API's own string fields; every other string is a property of the image's.
_API_FIELDS = {"id", "name", "status", "visibility", "owner", "file", "schema", "self", "direct_url"} | {
    *("created_at", "updated_at", "checksum", "os_hash_algo", "os_hash_value"),
    *("disk_format", "container_format"),
}


class BadRecord(ValueError):
    """What Glance sent is not JSON of the kind that was asked for; the message names the field."""


def parse_json(body: bytes) -> Mapping[str, object]:
    """Return the JSON object.  Raises BadRecord."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > VALUES_MAX:
        raise BadRecord(f"JSON of more than {VALUES_MAX} values")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as exc:
        # The text of such an error may quote the body; its kind says enough.
        raise BadRecord(f"not JSON ({type(exc).__name__})") from None
    if not isinstance(value, dict):
        raise BadRecord(f"a JSON {type(value).__name__} where an object was expected")
    return value


def parse_record(fields: Mapping[str, object]) -> ImageRecord:
    """Return the record of one image.  Raises BadRecord naming the field."""
    image_id = _required_text(fields, "id")
    if not is_image_id(image_id):
        # Names, paths and log lines are made of it.
        raise BadRecord("id: not a UUID")
    name = _text(fields, "name", is_word=False)
    return ImageRecord(
        id=image_id,
        # People choose names, terminals obey them: what would move a cursor or end a line is shown as a sign.
        name=None
        if name is None
        else "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in name),
        status=_required_text(fields, "status"),
        size_bytes=_size(fields, "size"),
        disk_format=_text(fields, "disk_format"),
        container_format=_text(fields, "container_format"),
        os_hash_algo=_text(fields, "os_hash_algo"),
        os_hash_value=_text(fields, "os_hash_value"),
        checksum=_text(fields, "checksum"),
        virtual_size_bytes=_size(fields, "virtual_size"),
        min_disk_gib=_size(fields, "min_disk") or 0,
        created_at=_text(fields, "created_at") or "",
        properties={
            key: value
            for key, value in fields.items()
            if key not in _API_FIELDS and _is_text(key) and isinstance(value, str) and _is_text(value)
        },
    )


def parse_list(fields: Mapping[str, object]) -> tuple[list[ImageRecord], str | None]:
    """Return a page's records and its link to the next page, None on the last.  Raises BadRecord.

    A record that cannot be understood is left out with a warning: it must not hide the others.
    """
    images = fields.get("images")
    if not isinstance(images, list):
        raise BadRecord("images: not a list")
    records = []
    for image in images:
        try:
            if not isinstance(image, dict):
                raise BadRecord(f"a JSON {type(image).__name__} where an image was expected")
            records.append(parse_record(image))
        except BadRecord as exc:
            logger.warning("list of images: a record is left out: %s", exc)
    return records, _text(fields, "next")


def _text(fields: Mapping[str, object], name: str, *, is_word: bool = True) -> str | None:
    """Return a field; is_word: errors and log lines may show it, so every character must be printable."""
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not _is_text(value) or (is_word and not value.isprintable()):
        raise BadRecord(f"{name}: not a string of at most {TEXT_LENGTH_MAX} printable characters")
    return value


def _required_text(fields: Mapping[str, object], name: str) -> str:
    value = _text(fields, name)
    if not value:
        raise BadRecord(f"{name}: missing")
    return value


def _is_text(value: str) -> bool:
    # JSON can carry lone surrogates, which no file name, hash or log line can.
    return len(value) <= TEXT_LENGTH_MAX and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _size(fields: Mapping[str, object], name: str) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    # A bool is an int to Python.
    if type(value) is not int or not 0 <= value <= SIZE_BYTES_MAX:
        raise BadRecord(f"{name}: not a whole number from 0 to 2**63 - 1")
    return value
