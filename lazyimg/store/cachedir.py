"""The cache folder: who may use it, what lies in it, and what is put aside when it is not as it should be.

    CACHE_DIR/             0700
    ├── version            FORMAT_VERSION and a newline
    ├── lock               flock; its text is the pid of who holds it
    ├── index/             see index.py
    ├── sidecars/          see sidecar.py
    ├── chunks/            <key>.<generation>: sparse files of the presented size, 0600
    ├── probe              there while the disk is probed
    └── aside/             see aside.py

Guards "what is not proven is fetched again": a file that is not exactly what the index says is never opened.
Nothing here is trusted for its name: files are opened by the folder's descriptor, and only if they are ours alone.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lazyimg.errors import CacheUnusable, InUse
from lazyimg.store.aside import Aside
from lazyimg.store.chunkfile import READ_BYTES_MAX, ChunkFile
from lazyimg.store.descriptor import FILES_MAX, Descriptor, DescriptorLimit
from lazyimg.store.entry import ImageEntry
from lazyimg.store.folder import PrivateFolder
from lazyimg.store.index import Index, IndexDamaged
from lazyimg.store.presence import PAGES_MAX, PageLimit
from lazyimg.store.sidecar import Sidecars
from lazyimg.store.spoolfile import Spools

FORMAT_VERSION = 1
_VERSION_TEXT = f"{FORMAT_VERSION}\n".encode()
# What a cache of another version, or one whose version is lost, may hold for us to take it for one.
_FOLDERS = ("index", "sidecars", "chunks")
_NAMES = {"version", "version.part", "lock", "aside", "probe", *_FOLDERS}
_VERSION_BYTES_MAX = 1024
_PROBE, _PROBE_BYTES = "probe", 4096

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """What this process found amiss in the folder, and what it did about it."""

    damaged_chunks: int
    rebuilt_images: int
    set_aside: int
    removed_files: int


class CacheDir:
    """The opened, locked cache folder.  All methods are for threads, except `close_image`."""

    index: Index
    spools: Spools

    def __init__(
        self,
        path: Path,
        lock_fd: int | None = None,
        *,
        pages_max: int = PAGES_MAX,
        files_max: int = FILES_MAX,
    ) -> None:
        """Open or create the folder.

        lock_fd: a descriptor of its `lock` file that is locked already, handed over by another process; owned
        by this object from now on.  files_max: chunk files that stay open between uses.  Raises CacheUnusable or
        InUse.
        """
        self.path = path
        self._limit = PageLimit(pages_max)
        self._descriptors = DescriptorLimit(files_max)
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))
        self._open: dict[str, ChunkFile] = {}
        # Held while a file is opened or removed, so that no image ever has two ChunkFiles.
        self._open_lock = threading.Lock()
        # Damaged chunks of files that are closed by now.
        self._damaged_count = self._removed_count = 0
        self._folders: list[PrivateFolder] = []
        try:
            self._root = self._held(PrivateFolder.open(path))
            is_other_version = _check_version(self._root)
            self.lock_fd = _lock(self._root, lock_fd)
            try:
                self._prepare(is_other_version)
            except BaseException:
                os.close(self.lock_fd)
                raise
        except BaseException as exc:
            for folder in self._folders:
                folder.close()
            if isinstance(exc, OSError):
                raise CacheUnusable(
                    f"cache folder {path}: {exc.strerror or exc}; make it usable or give another"
                ) from exc
            raise

    def _held(self, folder: PrivateFolder) -> PrivateFolder:
        self._folders.append(folder)
        return folder

    def _prepare(self, is_other_version: bool) -> None:
        """Make of a locked folder a cache that is open."""
        # What guests' images hold is nobody else's business.
        os.fchmod(self._root.fd, 0o700)
        self._aside = Aside(self._held(self._root.folder("aside")))
        if is_other_version:
            log.warning(
                "cache %s is of another version, set aside: all images will be fetched again", self.path
            )
            for name in _FOLDERS:
                self._aside.take(self._root, name)
        # Before there is anything it could be wrong about.
        if self._root.read("version", _VERSION_BYTES_MAX) != _VERSION_TEXT:
            self._root.replace("version", _VERSION_TEXT, is_durable=True)
        self._chunks = self._held(self._root.folder("chunks"))
        self.spools = Spools(self._chunks)
        self._sidecars = self._held(self._root.folder("sidecars"))
        self.index = self._open_index()
        # Their names too must be durable before anything is promised.
        self._root.sync()
        self._remove_unknown_files()

    def statistics(self) -> CacheStatistics:
        """Return a snapshot of what was found amiss since this process opened the folder."""
        damaged_count = self._damaged_count + sum(file.damaged_count for file in list(self._open.values()))
        return CacheStatistics(
            damaged_count, self.index.rebuilt_count, self._aside.count, self._removed_count
        )

    @staticmethod
    def check(path: Path) -> None:
        """Raise CacheUnusable unless this version could go on with the folder; whoever uses it is not disturbed."""
        try:
            folder = PrivateFolder.open(path)
            try:
                if _check_version(folder):
                    raise CacheUnusable(f"cache folder {path} is of another version; unmount and mount again")
            finally:
                folder.close()
        except OSError as exc:
            raise CacheUnusable(f"cache folder {path}: {exc.strerror or exc}; make it usable") from exc

    def free_bytes(self) -> int:
        """Return the bytes free on the folder's file system for this user."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def probe(self) -> None:
        """Write, sync and read back a small file; a full disk passes.  Raises OSError."""
        data = secrets.token_bytes(_PROBE_BYTES)
        self._root.remove(_PROBE)
        fd = self._root.open_file(_PROBE, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            try:
                os.pwrite(fd, data, 0)
                os.fsync(fd)
            except OSError as exc:
                if exc.errno in (errno.ENOSPC, errno.EDQUOT):
                    return
                raise
            # So that it comes from the disk, not from the page cache.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(fd, len(data) + 1, 0) != data:
                raise OSError(errno.EIO, f"{self.path / _PROBE}: read back is not what was written")
        finally:
            os.close(fd)
            self._root.remove(_PROBE)

    def open_image(self, key: str) -> ChunkFile:
        """Open the chunk file of an image that the index has; a new, empty one if there is none to trust.

        One that is open is returned as it is: it was opened by somebody who did not wait for it.  Raises KeyError
        for an unknown image, OSError.
        """
        with self._open_lock:
            if key in self._open:
                return self._open[key]
            entry = self.index.get(key)
            if entry is None:
                raise KeyError(key)
            file, problem = self._open_chunks(entry)
            if file is None:
                entry = self._begin(entry, problem)
                file, problem = self._open_chunks(entry)
                if file is None:
                    raise OSError(errno.EIO, f"chunk file {self._path_of(entry)} was just made: {problem}")
            try:
                self.index.heal_sidecar(key)
            except OSError as exc:
                # It is no more behind than before, and needed only where the index is lost.
                log.info("sidecar of key %s not compared with the index: %s", key, exc)
            # Somebody who did not wait for the disk may have opened it unseen.
            known = self._open.setdefault(key, file)
            if known is not file:
                file.close()
            return known

    def open_image_unseen(self, key: str) -> ChunkFile | None:
        """Return the chunk file of an image without looking at the disk, None if it has none; does not block.

        What is read of it later is proven as ever; if it is not what it must be, every use raises OSError.
        """
        entry = self.index.get(key)
        if entry is None or not entry.generation:
            return None
        # No lock, which a thread may hold that hangs: `open_image` of this key is not called meanwhile.
        return self._open.setdefault(key, self._chunk_file(entry))

    def close_image(self, key: str) -> None:
        """Close an image's chunk file, if open; see `ChunkFile.close`."""
        file = self._open.pop(key, None)
        if file is not None:
            self._damaged_count += file.damaged_count
            file.close()

    def remove_image(self, key: str) -> None:
        """Forget an image durably, then remove its bytes.  It is closed first.  Raises OSError."""
        with self._open_lock:
            self.close_image(key)
            self.spools.close(key)
            entry = self.index.get(key)
            self.index.forget(key)
            if entry is not None and entry.generation:
                self._chunks.remove(_name_of(entry))

    def allocated_bytes(self, key: str) -> int:
        """Return the bytes the image takes on disk, its spool's included; 0 if it has no chunk file."""
        entry = self.index.get(key)
        if entry is None or not entry.generation:
            return 0
        spool_bytes = self.spools.allocated_bytes(key)
        try:
            return spool_bytes + self._chunks.stat(_name_of(entry)).st_blocks * 512
        except FileNotFoundError:
            return spool_bytes

    def close(self) -> None:
        """Close all chunk files and the index, and give up this process's hold on the lock."""
        for key in list(self._open):
            self.close_image(key)
        self.spools.close_all()
        self.index.close()
        # Not unlocked: a holder may keep the lock by its own copy of the descriptor.
        os.close(self.lock_fd)
        for folder in self._folders:
            folder.close()

    def _path_of(self, entry: ImageEntry) -> Path:
        return self._chunks.path / _name_of(entry)

    def _chunk_file(self, entry: ImageEntry) -> ChunkFile:
        name = _name_of(entry)
        descriptor = Descriptor(self._chunks, name, entry.size_bytes, self._descriptors)
        return ChunkFile(self._chunks.path / name, descriptor, self.index, entry, self._limit, self._buffer)

    def _open_chunks(self, entry: ImageEntry) -> tuple[ChunkFile | None, str]:
        """Return an image's chunk file, open, or None and why that cannot be trusted."""
        if not entry.generation:
            return None, "none yet"
        file = self._chunk_file(entry)
        try:
            file.open()
        except OSError:
            # A disk that fails is not the file's fault; what is wrong with the file its name alone tells.
            problem = self._problem_of(entry)
            if not problem:
                raise
            return None, problem
        return file, ""

    def _problem_of(self, entry: ImageEntry) -> str:
        name = _name_of(entry)
        problem = self._chunks.problem_of(name)
        size_bytes = entry.size_bytes if problem else self._chunks.stat(name).st_size
        return (
            problem
            if size_bytes == entry.size_bytes
            else f"it has {size_bytes} bytes, not {entry.size_bytes}"
        )

    def _begin(self, entry: ImageEntry, problem: str) -> ImageEntry:
        """Begin a new chunk file; one that cannot be trusted is set aside."""
        generation = secrets.token_hex(8)
        # The file first, durably: a generation without its file is damage, a file without is removed at a start.
        fd = self._chunks.open_file(f"{entry.key}.{generation}", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.ftruncate(fd, entry.size_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        self._chunks.sync()
        fresh = self.index.begin(entry.key, generation)
        if entry.generation:
            path = self._path_of(entry)
            log.warning("chunk file %s set aside: %s; its image will be fetched again", path, problem)
            try:
                self._aside.take(self._chunks, path.name)
            except OSError as exc:
                # Nobody will open it under its old generation, and the next start removes it.
                log.warning("chunk file %s stays where it is: %s", path, exc)
        return fresh

    def _open_index(self) -> Index:
        for attempt in range(2):
            folder = self._root.folder("index")
            try:
                # SQLite opens its files by their paths, and follows links.
                problems = {name: folder.problem_of(name) for name in folder.names()}
                problem = next((f"{name}: {what}" for name, what in problems.items() if what), "")
                if problem:
                    raise IndexDamaged(f"{folder.path}/{problem}")
                index = Index(folder.path, Sidecars(self._sidecars))
                folder.sync()
                return index
            except IndexDamaged as exc:
                if attempt:
                    raise CacheUnusable(
                        f"cache folder {self.path}: a new index is damaged at once: {exc}"
                    ) from exc
                log.warning("cache index set aside: %s", exc)
            finally:
                folder.close()
            self._aside.take(self._root, "index")
        raise AssertionError("unreachable")

    def _remove_unknown_files(self) -> None:
        known = {_name_of(entry) for entry in self.index.entries() if entry.generation}
        for name in self._chunks.names():
            if name not in known:
                try:
                    self._chunks.remove(name)
                except OSError as exc:
                    # It takes room, and that is all it does.
                    log.warning("chunk file %s, which the index does not know, stays: %s", name, exc)
                else:
                    log.info("chunk file %s removed: the index does not know it", name)
                    self._removed_count += 1


def _name_of(entry: ImageEntry) -> str:
    return f"{entry.key}.{entry.generation}"


def _lock(root: PrivateFolder, lock_fd: int | None) -> int:
    """Return a descriptor that holds the lock."""
    fd = root.open_file("lock", os.O_RDWR | os.O_CREAT) if lock_fd is None else lock_fd
    try:
        # Whoever made another name for it may mean us to empty another file.
        if root.problem_of("lock") or not os.path.samestat(os.fstat(fd), root.stat("lock")):
            raise CacheUnusable(f"cache folder {root.path}: the lock handed over is not this folder's")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as exc:
        pid = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise InUse(f"cache folder {root.path} is used by process {pid}; stop that or give another") from exc
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_version(root: PrivateFolder) -> bool:
    """Return whether the folder is a cache of another version, older or unreadable, to be set aside.

    Refuses one of a later version, and one with somebody else's files, before anything is changed in it.
    """
    content = root.read("version", _VERSION_BYTES_MAX)
    names = set(root.names())
    if content == _VERSION_TEXT:
        return False
    found = (content or b"").decode(errors="replace").strip()
    with suppress(ValueError):
        if int(found) > FORMAT_VERSION:
            raise CacheUnusable(
                f"cache folder {root.path} is of version {found[:20]!r}, later than {FORMAT_VERSION}; "
                "run the lazyimg that made it, or give another"
            )
    if names - _NAMES:
        raise CacheUnusable(f"cache folder {root.path} holds other files; give an empty folder")
    return bool(names & set(_FOLDERS))
