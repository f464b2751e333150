"""What Glance says of an image, and the names derived from it.

Guards "never another identity's bytes": the cache key and the inode number are functions of identity and view.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# Nova looks up sha1("") at each pass of its cache manager; no image can have that id.
BASE_NAME_OF_NOTHING = hashlib.sha1(b"").hexdigest()
_BASE_NAME = re.compile(r"[0-9a-f]{40}")
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image as Glance's v2 API describes it (Image API ref, "Show image").

    size_bytes: bytes of the source, None while the image is queued.
    os_hash_value: hex digest by os_hash_algo; None for http-located images.
    properties: the image's own string properties, such as kernel_id and ramdisk_id.
    """

    id: str
    name: str | None
    status: str
    size_bytes: int | None
    disk_format: str | None
    container_format: str | None = None
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    checksum: str | None = None
    virtual_size_bytes: int | None = None
    min_disk_gib: int = 0
    created_at: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)

    @property
    def base_name(self) -> str:
        """The name under `_base`: sha1 of the id in hex (nova.virt.imagecache.get_cache_fname)."""
        return base_name(self.id)

    @property
    def source_hash(self) -> tuple[str, str] | None:
        """The hash of the source as hashlib's name and hex digest, None where Glance has none that can be computed."""
        algo, value = self.os_hash_algo, self.os_hash_value
        # Those named shake have no length of their own.
        if not algo or not value or algo not in hashlib.algorithms_available or algo.startswith("shake"):
            return None
        return algo, value.lower()

    def is_same_as(self, other: ImageRecord) -> bool:
        """True if the other record is of the same bytes."""
        return self._digest("") == other._digest("")

    def key(self, view: str) -> str:
        """Return the cache key of these bytes in this view: 32 hex digits, another for every other identity."""
        return self._digest(view)[:32]

    def inode(self, view: str) -> int:
        """Return the inode number, from 2**32 up to 2**63, never that of the root (1)."""
        return (int(self._digest(view)[32:48], 16) >> 1) | (1 << 32)

    def _digest(self, view: str) -> str:
        # os_hash_value where there is one, else checksum: either pins the content.
        identity = (self.id, self.size_bytes, self.os_hash_value or self.checksum, view)
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def to_json(self) -> str:
        """Return all fields as JSON; `from_json` is the reverse."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ImageRecord:
        """Return the record that `to_json` wrote.  Raises ValueError, TypeError or KeyError on anything else."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)


def base_name(image_id: str) -> str:
    """Return sha1(image_id) in hex, the file name Nova gives the image in its `_base` folder."""
    return hashlib.sha1(image_id.encode()).hexdigest()


def is_base_name(name: str) -> bool:
    """True for 40 lower-case hex digits."""
    return _BASE_NAME.fullmatch(name) is not None


def is_image_id(name: str) -> bool:
    """True for a UUID in its canonical, lower-case form."""
    return _UUID.fullmatch(name) is not None
