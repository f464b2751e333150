"""What is kept of one image in one view, and its form in the index."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, fields
from typing import Any

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_count
from lazyimg.core.identity import ImageRecord

ENTRY_VERSION = 1
_GENERATION = re.compile(r"([0-9a-f]{16})?")


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """What is kept of one image in one view.

    size_bytes: presented bytes.  generation: 16 hex digits naming the chunk file, "" while there is none.
    present_count: chunks durably present.  Both are the store's; `Index.put` never changes them. last_used_s,
    mtime_ns: wall time.  in_use: listed in `_base`. source: "ranges", "location" or "stream".  state, reason:
    as shown in status; reason says why it is refused.  verified: what is here was found to be what Glance's hash
    says; the store takes it back with any chunk it drops.
    """

    record: ImageRecord
    view: str
    size_bytes: int
    generation: str = ""
    present_count: int = 0
    last_used_s: float = 0.0
    mtime_ns: int = 0
    in_use: bool = False
    source: str = "ranges"
    state: str = "active"
    reason: str = ""
    verified: bool = False

    @property
    def key(self) -> str:
        """The cache key: a function of identity and view."""
        return self.record.key(self.view)

    @property
    def present_bytes(self) -> int:
        return min(self.present_count * CHUNK_SIZE_BYTES, self.size_bytes)

    def to_json(self) -> str:
        """Return a JSON object: `version`, ENTRY_VERSION; `record`, ImageRecord.to_json; each other field.

        The version changes with any field that must be known; entries of another version are dropped.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return json.dumps({"version": ENTRY_VERSION, **values, "record": self.record.to_json()})

    @classmethod
    def from_json(cls, text: str) -> ImageEntry:
        """Return the entry that `to_json` wrote.

        Raises ValueError, TypeError, KeyError or AttributeError for anything else.
        """
        values: dict[str, Any] = json.loads(text)
        if values.pop("version") != ENTRY_VERSION:
            raise ValueError("unknown version")
        values["record"] = ImageRecord.from_json(values["record"])
        entry = cls(**values)
        for name, kinds in _FIELD_TYPES.items():
            if type(getattr(entry, name)) not in kinds:
                raise TypeError(f"{name} is of the wrong type")
        if entry.size_bytes < 0 or not math.isfinite(entry.last_used_s):
            raise ValueError("size_bytes or last_used_s is out of range")
        # The generation becomes part of a path.
        if not _GENERATION.fullmatch(entry.generation):
            raise ValueError("generation is not 16 hex digits")
        if not 0 <= entry.present_count <= chunk_count(entry.size_bytes):
            raise ValueError("present_count does not fit size_bytes")
        return entry


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "view": (str,),
    "size_bytes": (int,),
    "generation": (str,),
    "present_count": (int,),
    "last_used_s": (int, float),
    "mtime_ns": (int,),
    "in_use": (bool,),
    "source": (str,),
    "state": (str,),
    "reason": (str,),
    "verified": (bool,),
}
