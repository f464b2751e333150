"""What the index says of each image, kept a second time in small files: from them an index that was lost is rebuilt.

    sidecars/
    ├── <key>.entry                 one JSON object: `version`, SIDECAR_VERSION; `entry`, ImageEntry.to_json with
    │                               present_count 0; `checksum`, of that text
    ├── <key>.<generation>.sums     page n at n * PAGE_BYTES, each as in the index, up to the last that was stored
    └── <key>.<generation>.tables   frames, one a table: start (uint64), length (uint32) and checksum (uint64), of
                                    those twelve bytes and the data; data.  Of two with one start the later counts

They are behind the index and never ahead of it, but for what is given up: that is gone from here, durably, before
the index forgets it, so that nothing dropped comes back.  What was added may be lost from here at power loss, and
is written again when the image is next opened.  A checksum from here proves a chunk as one of the index does: by
the chunk's bytes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
from array import array
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

from lazyimg.core.chunks import chunk_count
from lazyimg.store.checksum import checksum
from lazyimg.store.entry import ImageEntry
from lazyimg.store.fileio import pread_all
from lazyimg.store.folder import PrivateFolder

SIDECAR_VERSION = 1
# Larger than any record the client accepts.
ENTRY_BYTES_MAX = 4 << 20
# The tables of one image: 2.5 MiB for a qcow2 of 20 GiB.  One with more is opened with Glance's help if its index
# is lost.
TABLES_BYTES_MAX = 256 << 20
# Of the index, where it is made of checksums.
PAGE_BYTES = 8192
_SUM_BYTES = 8
_HEAD = struct.Struct("<QI")
_HEAD_SUM = struct.Struct("<Q")
_NAME = re.compile(r"([0-9a-f]{32})\.(?:entry|([0-9a-f]{16})\.(?:sums|tables))")

log = logging.getLogger(__name__)


class Sidecars:
    """The sidecars of all images (thread); the index serialises what changes.

    A method that adds never raises for the disk's sake: the image just has no second record for now.  One that gives
    up raises OSError where it could not.
    """

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder
        # Where the next table of an image goes, for those that were given one since the start.
        self._tables_ends: dict[tuple[str, str], int] = {}

    # ── additions ──

    def put(self, entry: ImageEntry, *, is_durable: bool) -> None:
        """Keep an entry.  is_durable: from now on, where the last one must not be believed any more."""
        text = _text_of(entry)
        values = {"version": SIDECAR_VERSION, "checksum": checksum(text.encode()), "entry": text}
        try:
            self._folder.replace(_entry_name(entry.key), json.dumps(values).encode(), is_durable=is_durable)
        except OSError as exc:
            log.info("sidecar of image %s not written: %s", entry.record.id, exc)

    def put_pages(self, entry: ImageEntry, pages: Mapping[int, bytes]) -> None:
        """Keep pages of checksums."""
        try:
            self._write_pages(entry, pages)
        except OSError as exc:
            log.info("sidecar of image %s not written: %s", entry.record.id, exc)

    def put_table(self, entry: ImageEntry, start: int, data: bytes) -> None:
        """Keep a part of the source, durably."""
        name, place = _tables_name(entry), (entry.key, entry.generation)
        head = _HEAD.pack(start, len(data))
        frame = head + _HEAD_SUM.pack(checksum(head + data)) + data
        try:
            fd = self._folder.open_file(name, os.O_RDWR | os.O_CREAT)
            try:
                end = self._tables_ends.get(place)
                if end is None:
                    end = sum(_HEAD.size + _HEAD_SUM.size + len(table) for _, table in _frames(fd))
                    # What a crash left torn behind the last whole one.
                    os.ftruncate(fd, end)
                if end + len(frame) > TABLES_BYTES_MAX:
                    return
                os.pwrite(fd, frame, end)
                os.fdatasync(fd)
            finally:
                os.close(fd)
            if not end:
                self._folder.sync()
            self._tables_ends[place] = end + len(frame)
        except OSError as exc:
            self._tables_ends.pop(place, None)
            log.info("sidecar %s not written: %s", name, exc)

    # ── giving up ──

    def drop(self, entry: ImageEntry, pages: Mapping[int, bytes]) -> None:
        """Keep pages in which chunks became absent, durably."""
        try:
            self._write_pages(entry, pages, is_durable=True)
        except OSError as exc:
            # Without it an index that is lost later is rebuilt without the image's chunks.
            log.info("sidecar of image %s removed, it could not be written: %s", entry.record.id, exc)
            self._folder.remove(_sums_name(entry))
            self._folder.sync()

    def forget(self, entry: ImageEntry) -> None:
        """Remove all of an image, durably."""
        self._folder.remove(_entry_name(entry.key))
        self.forget_generation(entry)

    def forget_generation(self, entry: ImageEntry) -> None:
        """Remove what is known of an image's chunk file, durably."""
        for name in (_sums_name(entry), _tables_name(entry)):
            self._folder.remove(name)
        self._tables_ends.pop((entry.key, entry.generation), None)
        self._folder.sync()

    # ── reading ──

    def entries(self) -> Iterator[ImageEntry]:
        """Yield all entries that can be trusted; the others are logged."""
        for name in sorted(self._folder.names()):
            match = _NAME.fullmatch(name)
            if match is not None and match[2] is None:
                entry = self.entry(match[1])
                if entry is None:
                    log.warning("sidecar %s is damaged or of another version; its image is forgotten", name)
                else:
                    yield entry

    def entry(self, key: str) -> ImageEntry | None:
        """Return the entry of a key, None if there is none to trust."""
        try:
            content = self._folder.read(_entry_name(key), ENTRY_BYTES_MAX)
            if content is None:
                return None
            values = json.loads(content)
            if values["version"] != SIDECAR_VERSION or values["checksum"] != checksum(
                values["entry"].encode()
            ):
                return None
            entry = ImageEntry.from_json(values["entry"])
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as exc:
            log.info("sidecar of key %s not read: %s", key, exc)
            return None
        return entry if entry.key == key else None

    def pages(self, entry: ImageEntry) -> Iterator[tuple[int, bytes]]:
        """Yield the pages of an image that have checksums, with their numbers."""
        sums_bytes = chunk_count(entry.size_bytes) * _SUM_BYTES
        try:
            fd = self._folder.open_file(_sums_name(entry), os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            for start in range(0, sums_bytes, PAGE_BYTES):
                page = pread_all(fd, start, min(start + PAGE_BYTES, sums_bytes)).ljust(PAGE_BYTES, b"\0")
                if page.count(0) != PAGE_BYTES:
                    yield start // PAGE_BYTES, page
        finally:
            os.close(fd)

    def present_count(self, entry: ImageEntry) -> int:
        """Return how many of an image's chunks have their checksum here; 0 where it cannot be read."""
        try:
            return sum(present_count(page) for _, page in self.pages(entry))
        except OSError as exc:
            log.info("sidecar of image %s not read: %s", entry.record.id, exc)
            return 0

    def tables(self, entry: ImageEntry) -> Iterator[tuple[int, bytes]]:
        """Yield the tables of an image, with the place of each in the source."""
        try:
            fd = self._folder.open_file(_tables_name(entry), os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            yield from _frames(fd)
        finally:
            os.close(fd)

    # ── healing ──

    def heal(self, entries: Collection[ImageEntry]) -> None:
        """Make the entries those of the index, which knows better; remove what belongs to none of them."""
        known = {entry.key: entry for entry in entries}
        for name in self._folder.names():
            match = _NAME.fullmatch(name)
            entry = known.get(match[1]) if match else None
            if match is None or entry is None or match[2] not in (None, entry.generation):
                try:
                    self._folder.remove(name)
                except OSError as exc:
                    log.warning("sidecar %s, whose image the index does not know, stays: %s", name, exc)
                else:
                    log.info("sidecar %s removed: the index does not know its image", name)
        for entry in known.values():
            kept = self.entry(entry.key)
            if kept is None or _text_of(kept) != _text_of(entry):
                self.put(entry, is_durable=False)

    def _write_pages(
        self, entry: ImageEntry, pages: Mapping[int, bytes], *, is_durable: bool = False
    ) -> None:
        fd = self._folder.open_file(_sums_name(entry), os.O_WRONLY | os.O_CREAT)
        try:
            for page_no, page in pages.items():
                assert len(page) == PAGE_BYTES, len(page)
                os.pwrite(fd, page, page_no * PAGE_BYTES)
            if is_durable:
                os.fdatasync(fd)
        finally:
            os.close(fd)


def present_count(page: bytes) -> int:
    """Return how many chunks a page has checksums of."""
    return len(page) // _SUM_BYTES - array("Q", page).count(0)


def _frames(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield place and data of each table up to the first that is torn."""
    at = 0
    while True:
        heads = pread_all(fd, at, at + _HEAD.size + _HEAD_SUM.size)
        if len(heads) != _HEAD.size + _HEAD_SUM.size:
            return
        head = heads[: _HEAD.size]
        start, size_bytes = _HEAD.unpack(head)
        at += len(heads)
        # Nothing is read into memory for a length alone.
        is_here = at + size_bytes <= min(os.fstat(fd).st_size, TABLES_BYTES_MAX)
        data = pread_all(fd, at, at + size_bytes) if is_here else b""
        if len(data) != size_bytes or _HEAD_SUM.unpack(heads[_HEAD.size :])[0] != checksum(head + data):
            return
        at += size_bytes
        yield start, data


def _text_of(entry: ImageEntry) -> str:
    # It changes with each commit; the pages say it too.
    return replace(entry, present_count=0).to_json()


def _entry_name(key: str) -> str:
    return f"{key}.entry"


def _sums_name(entry: ImageEntry) -> str:
    return f"{entry.key}.{entry.generation}.sums"


def _tables_name(entry: ImageEntry) -> str:
    return f"{entry.key}.{entry.generation}.tables"
