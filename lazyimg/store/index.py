"""The durable truth about every image: one entry each, and pages of chunk checksums.

Owns diskcache.  An entry and the pages that change with it are one SQLite transaction, synchronous=FULL, so
that what was forgotten stays forgotten and what was committed stays so (invariant 2).  Entries are few and
all in memory; pages are read one at a time.  Malformed entries and pages are dropped and logged: they cost a
fetch, never a start.  All of it is kept a second time in sidecars, and rebuilt from them where the index is lost.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import sqlite3
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import diskcache  # type: ignore[import-untyped]  # it has no types
from diskcache.core import MODE_RAW  # type: ignore[import-untyped]  # it has no types

from lazyimg.core.chunks import chunk_count
from lazyimg.store.checksum import checksum
from lazyimg.store.databasefile import errno_of, is_corrupt, is_cut_short, problem_of
from lazyimg.store.entry import ImageEntry
from lazyimg.store.sidecar import PAGE_BYTES, Sidecars, present_count

# 64 MiB of an image a page: 320 pages of 8 KiB for 20 GiB, and one page a commit for most boots.
PAGE_CHUNKS = 1024
_SUM = struct.Struct("<Q")
_PAGE = struct.Struct(f"<{PAGE_CHUNKS}Q")
_KEY = re.compile(r"[0-9a-f]{32}")
_KEYS = "images"
_DAMAGED = "damaged"
# diskcache's name for it.
_DATABASE = "cache.db"

log = logging.getLogger(__name__)


class IndexDamaged(Exception):
    """The index folder holds something that is not an index, or a torn one; it must be set aside."""


class _PlainDisk(diskcache.Disk):  # type: ignore[misc]  # diskcache has no types
    """Stores strings, bytes and numbers in SQLite; never unpickles, whatever the file holds."""

    def fetch(self, mode: int, filename: str | None, value: object, read: bool) -> object:
        return value if mode == MODE_RAW else None


class Index:
    """The index folder, opened.  Methods without `thread` in their docstring never block.

    On disk, in diskcache's `cache.db`, all values plain text or bytes:
        images                        JSON list of all keys, so that start-up never scans the pages
        image/<key>                   ImageEntry.to_json
        page/<key>/<generation>/<n>   PAGE_BYTES: checksums of chunks [1024 n, 1024 (n + 1)), little-endian
                                      uint64 each, 0 for absent; tag <key>
        table/<key>/<start>           checksum (uint64) of a part of the source, and the part; tag <key>
    Without `images` it is new or was lost, and is filled from the sidecars, `images` last.  Beside it a file
    `damaged` appears when SQLite found its file corrupt; the next start checks it, as one that is cut short, and
    sets the folder aside if it is.  Every fault of SQLite is raised as OSError: ENOSPC when the disk is full, EROFS
    when it is read-only, else EIO.
    """

    def __init__(self, path: Path, sidecars: Sidecars | None = None) -> None:
        """Open or create the index.  Raises IndexDamaged or OSError."""
        self._path = path
        self._sidecars = sidecars
        self.rebuilt_count = 0
        # Serialises changes, so that an entry is never written from an old copy.
        self._lock = threading.Lock()
        self._entries: dict[str, ImageEntry] = {}
        try:
            mark = path / _DAMAGED
            if mark.exists() or is_cut_short(path / _DATABASE):
                # SQLite calls a file corrupt also when one read of it fails with EIO (tried with 3.40.1): a disk that
                # failed for a moment must not cost the cache.
                problem = problem_of(path / _DATABASE)
                if problem:
                    raise IndexDamaged(f"{path}: found corrupt, or cut short: {problem}")
                mark.unlink(missing_ok=True)
            self._cache = diskcache.Cache(
                str(path),
                disk=_PlainDisk,
                eviction_policy="none",
                cull_limit=0,
                tag_index=1,
                # FULL: in WAL mode NORMAL may lose the last commits at power loss, and a lost forgetting is a
                # false bit.
                sqlite_synchronous=2,
                # Each thread has a connection: 256 pages of 4 KiB instead of 32 MiB.  No mmap: an I/O error
                # would be SIGBUS.
                sqlite_cache_size=256,
                sqlite_mmap_size=0,
                # Keeps every value inside SQLite and so inside the transaction.
                disk_min_file_size=1 << 24,
            )
            self._load_entries()
            if sidecars is not None:
                sidecars.heal(self.entries())
        except (sqlite3.Error, diskcache.Timeout) as exc:
            if is_corrupt(exc):
                raise IndexDamaged(f"{path}: {exc}") from exc
            raise OSError(errno_of(exc), f"cache index {path}: {exc}") from exc

    def entries(self) -> list[ImageEntry]:
        """Return all entries."""
        return list(self._entries.values())

    def get(self, key: str) -> ImageEntry | None:
        """Return the entry of this key, or None."""
        return self._entries.get(key)

    def put(self, *entries: ImageEntry) -> None:
        """Store entries durably in one transaction (thread).

        `generation` and `present_count` of an entry that exists are kept, whatever is given: the chunk file
        owns them.
        """
        with self._changing():
            merged = [self._merged(entry) for entry in entries]
            with self._cache.transact():
                for entry in merged:
                    self._cache.set(f"image/{entry.key}", entry.to_json())
                self._set_keys(self._entries.keys() | {entry.key for entry in merged})
            for entry in merged:
                known = self._entries.get(entry.key)
                if self._sidecars:
                    self._sidecars.put(entry, is_durable=known is not None and known.state != entry.state)
                self._entries[entry.key] = entry

    def begin(self, key: str, generation: str) -> ImageEntry:
        """Give the image a new, empty generation; the last one is forgotten durably (thread)."""
        with self._changing():
            last = self._entries[key]
            entry = replace(last, generation=generation, present_count=0, verified=False)
            if self._sidecars and last.generation:
                self._sidecars.forget_generation(last)
            with self._cache.transact():
                self._cache.evict(key)
                self._cache.set(f"image/{key}", entry.to_json())
            self._entries[key] = entry
            if self._sidecars:
                self._sidecars.put(entry, is_durable=True)
            return entry

    def forget(self, key: str) -> None:
        """Forget entry and pages durably and at once (thread); nothing happens if there is no such entry."""
        with self._changing():
            if key not in self._entries:
                return
            try:
                if self._sidecars:
                    self._sidecars.forget(self._entries[key])
            finally:
                with self._cache.transact():
                    self._cache.delete(f"image/{key}")
                    self._set_keys(self._entries.keys() - {key})
                    self._cache.evict(key)
                del self._entries[key]

    def page(self, key: str, generation: str, page_no: int) -> tuple[int, ...]:
        """Return the checksums of PAGE_CHUNKS chunks, 0 for absent ones (thread)."""
        with self._translated():
            value = self._cache.get(_page_key(key, generation, page_no))
        if isinstance(value, bytes) and len(value) == _PAGE.size:
            return _PAGE.unpack(value)
        if value is not None:
            log.warning(
                "cache index: page %d of %s is malformed; its chunks will be fetched again", page_no, key
            )
        return (0,) * PAGE_CHUNKS

    def commit(
        self,
        key: str,
        generation: str,
        pages: Mapping[int, Sequence[int]],
        present_count: int,
        *,
        drops: bool = False,
    ) -> None:
        """Store checksum pages and the entry's count in one durable transaction (thread).

        drops: the pages say of some chunks for the first time that they are absent.
        Raises OSError(ESTALE) if the image was forgotten or began another generation meanwhile.
        """
        with self._changing():
            entry = self._entries.get(key)
            if entry is None or entry.generation != generation:
                raise OSError(
                    errno.ESTALE, f"cache index: image {key} has no generation {generation} any more"
                )
            is_whole = present_count == chunk_count(entry.size_bytes)
            # What is fetched for a chunk that was dropped has not been compared with anything.
            verified = entry.verified and is_whole and not drops
            entry = replace(entry, present_count=present_count, verified=verified)
            packed = {page_no: _PAGE.pack(*sums) for page_no, sums in pages.items()}
            try:
                if self._sidecars and drops:
                    self._sidecars.drop(entry, packed)
            finally:
                with self._cache.transact():
                    for page_no, page in packed.items():
                        self._cache.set(_page_key(key, generation, page_no), page, tag=key)
                    self._cache.set(f"image/{key}", entry.to_json())
                self._entries[key] = entry
            if self._sidecars and not drops:
                self._sidecars.put_pages(entry, packed)

    def table(self, key: str, start: int, stop: int) -> bytes | None:
        """Return the part `[start, stop)` of an image's source that was put, None if it is not here (thread)."""
        with self._translated():
            value = self._cache.get(_table_key(key, start))
        if not isinstance(value, bytes) or len(value) != _SUM.size + stop - start:
            return None
        data = value[_SUM.size :]
        # A wrong table would make wrong bytes of right ones.
        return data if _SUM.unpack_from(value)[0] == checksum(data) else None

    def put_table(self, key: str, start: int, data: bytes) -> None:
        """Keep a part of an image's source, as long as the index knows the image (thread)."""
        with self._changing():
            entry = self._entries.get(key)
            if entry is not None:
                self._cache.set(_table_key(key, start), _SUM.pack(checksum(data)) + data, tag=key)
                if self._sidecars and entry.generation:
                    self._sidecars.put_table(entry, start, data)

    def heal_sidecar(self, key: str) -> None:
        """Give an image's sidecar the checksums that power loss took from it (thread)."""
        with self._changing():
            entry = self._entries[key]
            if self._sidecars is None or self._sidecars.present_count(entry) == entry.present_count:
                return
            for page_no in range(-(-chunk_count(entry.size_bytes) // PAGE_CHUNKS)):
                page = self._cache.get(_page_key(key, entry.generation, page_no))
                if isinstance(page, bytes) and len(page) == PAGE_BYTES:
                    self._sidecars.put_pages(entry, {page_no: page})

    def close(self) -> None:
        """Close the calling thread's connection; other threads' close as those threads end."""
        self._cache.close()

    def _merged(self, entry: ImageEntry) -> ImageEntry:
        known = self._entries.get(entry.key)
        if known is None:
            return replace(entry, generation="", present_count=0, verified=False)
        is_whole = known.present_count == chunk_count(known.size_bytes)
        return replace(
            entry,
            generation=known.generation,
            present_count=known.present_count,
            verified=entry.verified and is_whole,
        )

    def _set_keys(self, keys: set[str]) -> None:
        if keys != self._entries.keys():
            self._cache.set(_KEYS, json.dumps(sorted(keys)))

    def _load_entries(self) -> None:
        keys = self._load_keys()
        if keys is None:
            self._rebuild()
            return
        for key in keys:
            try:
                entry = ImageEntry.from_json(self._cache.get(f"image/{key}"))
                if entry.key != key:
                    raise ValueError("belongs to another key")
            except (ValueError, TypeError, KeyError, AttributeError) as exc:
                self._load_second(key, exc)
            else:
                self._entries[key] = entry
        dropped = set(keys) - self._entries.keys()
        if dropped:
            with self._cache.transact():
                for key in dropped:
                    self._cache.delete(f"image/{key}")
                    self._cache.evict(key)
                self._cache.set(_KEYS, json.dumps(sorted(self._entries)))

    def _load_second(self, key: str, problem: Exception) -> None:
        """Take an entry from its sidecar, where the first is malformed."""
        entry = self._sidecars.entry(key) if self._sidecars else None
        if entry is None:
            log.warning("cache index: entry %s dropped, its image will be fetched again: %s", key, problem)
        else:
            log.warning("cache index: entry %s is taken from its sidecar: %s", key, problem)
            self._restore(entry)

    def _load_keys(self) -> list[str] | None:
        text = self._cache.get(_KEYS)
        if text is None:
            return None
        try:
            keys = json.loads(text)
            if isinstance(keys, list) and all(isinstance(key, str) and _KEY.fullmatch(key) for key in keys):
                return keys
        except (ValueError, TypeError):
            pass
        raise IndexDamaged(f"{self._path}: the list of images is malformed")

    def _rebuild(self) -> None:
        """Fill a new index with what the sidecars have; done again from the beginning if it is cut short."""
        for entry in self._sidecars.entries() if self._sidecars else ():
            self._restore(entry)
        self._cache.set(_KEYS, json.dumps(sorted(self._entries)))
        self.rebuilt_count = len(self._entries)
        if self._entries:
            chunks = sum(entry.present_count for entry in self.entries())
            log.warning(
                "cache index rebuilt from sidecars: %d images, %d chunks; each is checked when it is first read",
                len(self._entries),
                chunks,
            )

    def _restore(self, entry: ImageEntry) -> None:
        """Store what an image's sidecars have, one transaction an image."""
        assert self._sidecars is not None
        with self._cache.transact():
            self._cache.evict(entry.key)
            count = 0
            try:
                for page_no, page in self._sidecars.pages(entry):
                    self._cache.set(_page_key(entry.key, entry.generation, page_no), page, tag=entry.key)
                    count += present_count(page)
                for start, data in self._sidecars.tables(entry):
                    self._cache.set(
                        _table_key(entry.key, start), _SUM.pack(checksum(data)) + data, tag=entry.key
                    )
            except OSError as exc:
                log.warning("sidecar of image %s: read in part: %s", entry.record.id, exc)
            # Chunks may have been dropped since the sidecar was written: it is compared again.
            entry = replace(entry, present_count=count, verified=False)
            self._cache.set(f"image/{entry.key}", entry.to_json())
        self._entries[entry.key] = entry

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock, self._translated():
            yield

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, diskcache.Timeout) as exc:
            # A failed COMMIT may leave the connection inside its transaction (SQLite, "Response To Errors
            # Within A Transaction"), where every later one fails; closing it rolls back.
            with suppress(sqlite3.Error):
                self._cache.close()
            if is_corrupt(exc):
                # If even this fails the next start finds out for itself.
                with suppress(OSError):
                    (self._path / _DAMAGED).touch()
            raise OSError(errno_of(exc), f"cache index {self._path}: {exc}") from exc


def _table_key(key: str, start: int) -> str:
    return f"table/{key}/{start}"


def _page_key(key: str, generation: str, page_no: int) -> str:
    return f"page/{key}/{generation}/{page_no}"
