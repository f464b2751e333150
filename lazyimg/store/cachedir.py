"""The cache folder: who may use it, what lies in it, and what is put aside when it is not as it should be.

    CACHE_DIR/             0700
    ├── version            FORMAT_VERSION and a newline
    ├── lock               flock; its text is the pid of who holds it
    ├── index/             see index.py
    ├── chunks/            <key>.<generation>: sparse files of the presented size, 0600
    └── aside/             what was found damaged, for a human; bounded

Guards "what is not proven is fetched again": a file that is not exactly what the index says is never opened.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
import threading
from pathlib import Path

from lazyimg.errors import CacheUnusable, InUse
from lazyimg.store.chunkfile import READ_BYTES_MAX, ChunkFile
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index, IndexDamaged
from lazyimg.store.presence import PAGES_MAX, PageLimit

FORMAT_VERSION = "1"
# Evidence for a human, not worth more than this of the cache's disk.
ASIDE_COUNT_MAX = 8
ASIDE_BYTES_MAX = 256 << 20

log = logging.getLogger(__name__)


class CacheDir:
    """The opened, locked cache folder.  All methods are for threads, except `close_image`."""

    index: Index

    def __init__(self, path: Path, lock_fd: int | None = None, *, pages_max: int = PAGES_MAX) -> None:
        """Open or create the folder.

        lock_fd: a descriptor of its `lock` file that is locked already, handed over by another process; owned
        by this object from now on.  Raises CacheUnusable or InUse.
        """
        self.path = path
        self._chunks = path / "chunks"
        self._aside = path / "aside"
        self._limit = PageLimit(pages_max)
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))
        self._open: dict[str, ChunkFile] = {}
        # Held while a file is opened or removed, so that no image ever has two ChunkFiles.
        self._open_lock = threading.Lock()
        try:
            _check_folder(path)
            _check_version(path)
            self.lock_fd = _lock(path / "lock", lock_fd)
            try:
                # What guests' images hold is nobody else's business.
                path.chmod(0o700)
                _write_version(path)
                for folder in (self._chunks, self._aside):
                    folder.mkdir(mode=0o700, exist_ok=True)
                self.index = self._open_index()
                self._remove_unknown_files()
            except BaseException:
                os.close(self.lock_fd)
                raise
        except OSError as exc:
            raise CacheUnusable(
                f"cache folder {path}: {exc.strerror or exc}; make it usable or give another"
            ) from exc

    def free_bytes(self) -> int:
        """Return the bytes free on the folder's file system for this user."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def open_image(self, key: str) -> ChunkFile:
        """Open the chunk file of an image that the index has; a new, empty one if there is none to trust.

        It must not be open already.  Raises KeyError for an unknown image, OSError.
        """
        with self._open_lock:
            assert key not in self._open, key
            entry = self.index.get(key)
            if entry is None:
                raise KeyError(key)
            problem = _problem_of(self._path_of(entry), entry.size_bytes) if entry.generation else "none yet"
            if problem:
                entry = self._begin(entry, problem)
            file = ChunkFile(self._path_of(entry), self.index, entry, self._limit, self._buffer)
            self._open[key] = file
            return file

    def close_image(self, key: str) -> None:
        """Close an image's chunk file, if open; see `ChunkFile.close`."""
        file = self._open.pop(key, None)
        if file is not None:
            file.close()

    def remove_image(self, key: str) -> None:
        """Forget an image durably, then remove its bytes.  It is closed first.  Raises OSError."""
        with self._open_lock:
            self.close_image(key)
            entry = self.index.get(key)
            self.index.forget(key)
            if entry is not None and entry.generation:
                self._path_of(entry).unlink(missing_ok=True)

    def allocated_bytes(self, key: str) -> int:
        """Return the bytes the image takes on disk; 0 if it has no chunk file."""
        entry = self.index.get(key)
        if entry is None or not entry.generation:
            return 0
        try:
            return os.lstat(self._path_of(entry)).st_blocks * 512
        except FileNotFoundError:
            return 0

    def close(self) -> None:
        """Close all chunk files and the index, and give up this process's hold on the lock."""
        for key in list(self._open):
            self.close_image(key)
        self.index.close()
        # Not unlocked: a holder may keep the lock by its own copy of the descriptor.
        os.close(self.lock_fd)

    def _path_of(self, entry: ImageEntry) -> Path:
        return self._chunks / f"{entry.key}.{entry.generation}"

    def _begin(self, entry: ImageEntry, problem: str) -> ImageEntry:
        """Begin a new chunk file; one that cannot be trusted is set aside."""
        # The index forgets first, so that no page of checksums ever speaks of another file's bytes.
        fresh = self.index.begin(entry.key, secrets.token_hex(8))
        if entry.generation:
            path = self._path_of(entry)
            log.warning("chunk file %s set aside: %s; its image will be fetched again", path, problem)
            try:
                self._set_aside(path)
            except OSError as exc:
                # Nobody will open it under its old generation, and the next start removes it.
                log.warning("chunk file %s stays where it is: %s", path, exc)
        self._create(self._path_of(fresh), fresh.size_bytes)
        return fresh

    def _create(self, path: Path, size_bytes: int) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
        finally:
            os.close(fd)
        _sync_folder(self._chunks)

    def _open_index(self) -> Index:
        path = self.path / "index"
        path.mkdir(mode=0o700, exist_ok=True)
        try:
            return Index(path)
        except IndexDamaged as exc:
            log.warning("cache index set aside, all images will be fetched again: %s", exc)
        self._set_aside(path)
        path.mkdir(mode=0o700)
        try:
            return Index(path)
        except IndexDamaged as exc:
            raise CacheUnusable(f"cache folder {self.path}: a new index is damaged at once: {exc}") from exc

    def _remove_unknown_files(self) -> None:
        known = {self._path_of(entry).name for entry in self.index.entries() if entry.generation}
        for found in os.scandir(self._chunks):
            if found.name not in known:
                log.info("chunk file %s removed: the index does not know it", found.name)
                _remove(Path(found.path))

    def _set_aside(self, path: Path) -> None:
        """Move a file or folder to `aside/`, and remove the oldest there above its limits."""
        target = self._aside / f"{path.name}.{secrets.token_hex(4)}"
        try:
            path.rename(target)
            os.utime(target, follow_symlinks=False)
        except FileNotFoundError:
            return
        kept = sorted(self._aside.iterdir(), key=lambda one: one.lstat().st_mtime_ns, reverse=True)
        total_bytes = 0
        for count, one in enumerate(kept, 1):
            total_bytes += _allocated_bytes(one)
            if count > ASIDE_COUNT_MAX or total_bytes > ASIDE_BYTES_MAX:
                _remove(one)


def _check_folder(path: Path) -> None:
    """Create the folder, or refuse it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise CacheUnusable(f"cache folder {path} is a symbolic link; give the folder itself")
    if found.st_uid != os.geteuid():
        raise CacheUnusable(
            f"cache folder {path} belongs to user {found.st_uid}, not {os.geteuid()}; "
            "chown it or give another"
        )
    if found.st_mode & 0o022:
        raise CacheUnusable(f"cache folder {path} can be written by others; run: chmod go-w {path}")


def _lock(path: Path, lock_fd: int | None) -> int:
    """Return a descriptor that holds the lock."""
    fd = (
        os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if lock_fd is None
        else lock_fd
    )
    try:
        if not path.exists() or not os.path.samestat(os.fstat(fd), path.stat()):
            raise CacheUnusable(f"cache folder {path.parent}: the lock handed over is not this folder's")
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as exc:
        pid = os.pread(fd, 20, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise InUse(
            f"cache folder {path.parent} is used by process {pid}; stop that or give another"
        ) from exc
    except BaseException:
        os.close(fd)
        raise
    return fd


def _check_version(path: Path) -> None:
    """Refuse a folder of another version, or with somebody else's files, before anything is changed in it."""
    try:
        found = (path / "version").read_text(errors="replace").strip()
    except FileNotFoundError:
        if set(os.listdir(path)) - {"lock", "version.part"}:
            raise CacheUnusable(f"cache folder {path} holds other files; give an empty folder") from None
        return
    if found != FORMAT_VERSION:
        raise CacheUnusable(
            f"cache folder {path} is of version {found[:20]!r}, not {FORMAT_VERSION!r}; "
            "give another or empty it"
        )


def _write_version(path: Path) -> None:
    version = path / "version"
    if not version.exists():
        part = path / "version.part"
        part.write_text(f"{FORMAT_VERSION}\n")
        part.replace(version)
        _sync_folder(path)


def _problem_of(path: Path, size_bytes: int) -> str:
    """Return why a chunk file cannot be trusted, or ""."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return "it is missing"
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if found.st_nlink != 1:
        return "it has another name, through which it may be changed"
    if found.st_size != size_bytes:
        return f"it has {found.st_size} bytes, not {size_bytes}"
    return ""


def _allocated_bytes(path: Path) -> int:
    parts = [path, *path.rglob("*")] if path.is_dir() and not path.is_symlink() else [path]
    return sum(part.lstat().st_blocks * 512 for part in parts)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
