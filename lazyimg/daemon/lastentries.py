"""What this daemon knows of each image, kept where the next one finds it when the cache's disk does not answer.

Behind the counts in the memory file of handles.py, since that is the daemons' own: two slots, written in turn, of which
the valid one with the higher number counts, so that a daemon killed while it writes leaves the one before.  Each is

    number u64 | length u64 | crc32 u32, of number and entries | pad u32 | entries, one ImageEntry.to_json a line
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Iterable

from lazyimg.daemon.handles import TABLE_BYTES
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)

_HEADER = struct.Struct("<QQII")
# Apart by more than entries ever take; the file has holes.
_SLOT_BYTES = 1 << 32
_SLOTS = (TABLE_BYTES, TABLE_BYTES + _SLOT_BYTES)


class LastEntries:
    """The entries in the memory file `fd`, which stays the caller's.  Used by one thread at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        slots = {slot: self._read(slot) for slot in _SLOTS}
        self._slot = max(_SLOTS, key=lambda slot: slots[slot][0])
        self._number, data = slots[self._slot]
        # What the last daemon kept; None if there was none.
        self.found: list[ImageEntry] | None = None if data is None else _parsed(data)
        # By key; an entry does not change, nor its line.
        self._lines: dict[str, tuple[ImageEntry, bytes]] = {}

    def keep(self, entries: Iterable[ImageEntry]) -> None:
        """Replace what is kept."""
        lines: dict[str, tuple[ImageEntry, bytes]] = {}
        for entry in entries:
            last = self._lines.get(entry.key)
            lines[entry.key] = (
                last if last is not None and last[0] is entry else (entry, entry.to_json().encode())
            )
        self._lines = lines
        data = b"\n".join(line for _, line in lines.values())
        slot = next(one for one in _SLOTS if one != self._slot)
        header = _HEADER.pack(self._number + 1, len(data), _checksum(self._number + 1, data), 0)
        try:
            os.pwrite(self._fd, header + data, slot)
        except OSError as exc:
            logger.warning("the next daemon would not know the images without the cache disk: %s", exc)
            return
        self._slot, self._number = slot, self._number + 1

    def _read(self, slot: int) -> tuple[int, bytes | None]:
        header = os.pread(self._fd, _HEADER.size, slot)
        if len(header) < _HEADER.size:
            return 0, None
        number, length, crc, _ = _HEADER.unpack(header)
        data = os.pread(self._fd, min(length, _SLOT_BYTES), slot + _HEADER.size)
        is_valid = number and len(data) == length and _checksum(number, data) == crc
        return (number, data) if is_valid else (0, None)


def _checksum(number: int, data: bytes) -> int:
    return zlib.crc32(data, number & 0xFFFFFFFF)


def _parsed(data: bytes) -> list[ImageEntry]:
    entries = []
    for line in data.splitlines():
        try:
            entries.append(ImageEntry.from_json(line.decode()))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            # Of another version of this program.
            logger.warning("what the last daemon knew of an image is not understood: %s", exc)
    return entries
