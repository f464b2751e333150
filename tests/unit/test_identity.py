"""Names, keys and inode numbers are functions of identity and view."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest

from lazyimg.core.identity import (
    BASE_NAME_OF_NOTHING,
    ImageRecord,
    base_name,
    is_base_name,
    is_image_id,
)

IMAGE_ID = "4e2f5a0c-4d65-43d5-9d58-8ac2d2b2ff17"
RECORD = ImageRecord(
    IMAGE_ID,
    "debian",
    "active",
    1 << 30,
    "raw",
    "bare",
    "sha512",
    "ab" * 64,
    checksum="cd" * 16,
    properties={"kernel_id": "k"},
)


def test_base_name_is_novas() -> None:
    """The name under `_base` is sha1 of the id in hex, as nova.virt.imagecache makes it."""
    assert RECORD.base_name == base_name(IMAGE_ID) == hashlib.sha1(IMAGE_ID.encode()).hexdigest()
    assert BASE_NAME_OF_NOTHING == "da39a3ee5e6b4b0d3255bfef95601890afd80709"


@pytest.mark.parametrize(
    "change",
    [
        {"id": "00000000-0000-0000-0000-000000000001"},
        {"size_bytes": 1},
        {"os_hash_value": "00" * 64},
        {"os_hash_value": None},
        {"os_hash_value": None, "checksum": None},
    ],
)
def test_other_identity_has_other_key_and_inode(change: dict[str, object]) -> None:
    """[I1] Another id, size or content is another file: never another identity's bytes under an old number."""
    other = replace(RECORD, **change)  # type: ignore[arg-type]  # any field
    assert other.key("stored") != RECORD.key("stored")
    assert other.inode("stored") != RECORD.inode("stored")


def test_other_view_has_other_key_and_inode() -> None:
    """[I1] The bytes of one view are never taken for another's."""
    assert RECORD.key("raw") != RECORD.key("stored")
    assert RECORD.inode("raw") != RECORD.inode("stored")


def test_what_is_not_identity_changes_nothing() -> None:
    """A renamed or re-tagged image keeps its chunks and its inode number."""
    other = replace(RECORD, name="other", properties={}, min_disk_gib=7, created_at="2026-01-01")
    assert (other.key("stored"), other.inode("stored")) == (RECORD.key("stored"), RECORD.inode("stored"))


def test_key_and_inode_stay_what_they_are() -> None:
    """Caches on disk and inode numbers in kernels outlive the program: these values are a format."""
    assert RECORD.key("stored") == "89f4ca74ff793b4b0cedd63cb096065f"
    assert RECORD.inode("stored") == 148142265401227269


def test_record_outlives_json() -> None:
    """What the index stores is read back as it was."""
    assert ImageRecord.from_json(RECORD.to_json()) == RECORD


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": "x", "unknown": 1}', "null"])
def test_other_json_is_refused(text: str) -> None:
    """Malformed text raises one of the errors the index expects."""
    with pytest.raises((ValueError, TypeError, KeyError)):
        ImageRecord.from_json(text)


@pytest.mark.parametrize(
    ("name", "base", "uuid"),
    [
        (BASE_NAME_OF_NOTHING, True, False),
        (IMAGE_ID, False, True),
        (IMAGE_ID.upper(), False, False),
        (BASE_NAME_OF_NOTHING.upper(), False, False),
        (BASE_NAME_OF_NOTHING + "\n", False, False),
        (BASE_NAME_OF_NOTHING + "_20480", False, False),
        ("", False, False),
    ],
)
def test_names_are_recognised_exactly(name: str, base: bool, uuid: bool) -> None:
    """Only 40 lower-case hex digits or a canonical UUID can stand for an image."""
    assert (is_base_name(name), is_image_id(name)) == (base, uuid)
