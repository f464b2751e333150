"""What the embedded Glance stores: records as JSON and data as files, in one folder, kept across restarts.

Synchronous.  Not a cache and not durable against power loss: it serves the demo, tests and benchmarks.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BLOCK_SIZE_BYTES = 1 << 20
_ZEROS = bytes(BLOCK_SIZE_BYTES)
# What a request may set; every other string is a property.
SETTABLE = {"name", "disk_format", "container_format", "visibility", "os_hidden", "min_disk", "min_ram"} | {
    "protected",
    "tags",
}

Fields = dict[str, Any]

# A new image's record but for its name, its times and its links.
_NEW: Fields = {
    "name": None,
    "disk_format": None,
    "container_format": None,
    "visibility": "shared",
    "size": None,
    "virtual_size": None,
    "status": "queued",
    "checksum": None,
    "protected": False,
    "min_ram": 0,
    "min_disk": 0,
    "owner": None,
    "os_hidden": False,
    "os_hash_algo": None,
    "os_hash_value": None,
}
# The fields that every image has; any other is a property.
BASE_FIELDS = (*_NEW, "id", "created_at", "updated_at", "tags", "self", "file", "schema")


class GlanceImages:
    """All images of one folder, each a record as the API shows it and maybe a file of data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._records: dict[str, Fields] = {}
        for path in sorted(folder.glob("*.json")):
            fields = json.loads(path.read_text())
            self._records[fields["id"]] = fields

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._records

    def get(self, image_id: str) -> Fields | None:
        """Return the record as the API shows it."""
        return self._records.get(image_id)

    def newest_first(self) -> list[Fields]:
        """Return all records."""
        return sorted(
            self._records.values(), key=lambda fields: (fields["created_at"], fields["id"]), reverse=True
        )

    def data_path(self, image_id: str) -> Path:
        """Return where the image's bytes are, or would be."""
        return self._folder / f"{image_id}.data"

    def create(self, settings: Mapping[str, Any]) -> Fields:
        """Return the record of a new, queued image.  The id must be a UUID that is not taken."""
        image_id = str(settings.get("id") or uuid.uuid4())
        # Microseconds, which Glance does not show, keep the order of images made in one second.
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        fields: Fields = {
            **_NEW,
            "id": image_id,
            "created_at": now,
            "updated_at": now,
            "tags": [],
            "self": f"/v2/images/{image_id}",
            "file": f"/v2/images/{image_id}/file",
            "schema": "/v2/schemas/image",
        }
        self._records[image_id] = fields
        return self.change(
            image_id,
            {
                key: value
                for key, value in settings.items()
                if key in SETTABLE or (key not in fields and isinstance(value, str))
            },
        )

    def change(self, image_id: str, changes: Mapping[str, Any]) -> Fields:
        """Set fields of the record (None as the value of a property removes it) and return it."""
        fields = self._records[image_id]
        for key, value in changes.items():
            if value is None and key not in SETTABLE and key not in _NULLABLE:
                fields.pop(key, None)
            else:
                fields[key] = value
        path = self._folder / f"{image_id}.json"
        # Not the name of the data on its way.
        partial = path.with_suffix(".json.part")
        partial.write_text(json.dumps(fields))
        partial.replace(path)
        return fields

    def activate(self, image_id: str, size_bytes: int, md5: str | None, sha512: str | None) -> Fields:
        """Tell that all data is there, and its hashes if they are known."""
        is_raw = self._records[image_id]["disk_format"] == "raw"
        return self.change(
            image_id,
            {
                "status": "active",
                "size": size_bytes,
                "virtual_size": size_bytes if is_raw else None,
                "checksum": md5,
                "os_hash_algo": "sha512" if sha512 else None,
                "os_hash_value": sha512,
            },
        )

    def delete(self, image_id: str) -> None:
        """Forget the image and remove its data."""
        del self._records[image_id]
        self.data_path(image_id).unlink(missing_ok=True)
        (self._folder / f"{image_id}.json").unlink()

    def link(self, image_id: str, source: Path, *, with_hash: bool) -> Fields:
        """Take a file as the image's data without copying it where the file system can."""
        path = self.data_path(image_id)
        path.symlink_to(source.resolve())
        md5, sha512 = _hashes(path) if with_hash else (None, None)
        return self.activate(image_id, path.stat().st_size, md5, sha512)


class DataWriter:
    """Writes one image's data and hashes it on the way; runs of zeros become holes.  Call in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_suffix(".part")
        self._file = self._partial.open("wb")
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._sha512 = hashlib.sha512()
        self.size_bytes = 0

    def write(self, block: bytes | bytearray) -> None:
        """Append at most BLOCK_SIZE_BYTES."""
        # Both let go of the interpreter while they work, so they run side by side.
        hashing = threading.Thread(target=self._md5.update, args=(block,))
        hashing.start()
        self._sha512.update(block)
        hashing.join()
        if block == _ZEROS[: len(block)]:
            self._file.seek(len(block), os.SEEK_CUR)
        else:
            self._file.write(block)
        self.size_bytes += len(block)

    def finish(self) -> tuple[int, str, str]:
        """Put the file in place and return its size, md5 and sha512."""
        self._file.truncate(self.size_bytes)
        self._file.close()
        self._partial.replace(self._path)
        return self.size_bytes, self._md5.hexdigest(), self._sha512.hexdigest()

    def abandon(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


_NULLABLE = {"size", "virtual_size", "checksum", "os_hash_algo", "os_hash_value", "owner"}


def _hashes(path: Path) -> tuple[str, str]:
    md5, sha512 = hashlib.md5(usedforsecurity=False), hashlib.sha512()
    with path.open("rb") as file:
        while block := file.read(BLOCK_SIZE_BYTES):
            md5.update(block)
            sha512.update(block)
    return md5.hexdigest(), sha512.hexdigest()
