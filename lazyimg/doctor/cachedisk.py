"""Whether the cache folder's disk can do what lazyimg asks of it.  Writes only to a file without a name."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO

from lazyimg.doctor.finding import Finding, fail, ok, warn

CHECK = "cache disk"
# Written and synced so often; the median is told.
SYNCS = 5
SYNC_BYTES = 64 << 10
# A disk that takes longer keeps what is fetched from being durable, not guests from reading.
SYNC_SLOW_S = 0.1
HOLE_BYTES = 1 << 20
# Gone with the machine's memory, or without the locks and the durability that the index needs.
VOLATILE = ("tmpfs", "ramfs")
REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs")


def cache_checks(
    cache_dir: Path, free_min_bytes: int, *, mounts: Path = Path("/proc/self/mountinfo")
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield each check by its name; they block, and raise nothing but OSError."""
    yield "cache folder", partial(folder, cache_dir)
    yield "cache space", partial(space, cache_dir, free_min_bytes)
    yield "cache file system", partial(file_system, cache_dir, mounts)
    yield "cache holes", partial(_on_a_file, "cache holes", cache_dir, holes)
    yield "cache reads", partial(_on_a_file, "cache reads", cache_dir, reads_at_once)
    yield "cache syncs", partial(_on_a_file, "cache syncs", cache_dir, syncs)


def folder(cache_dir: Path) -> Finding:
    """Whether the folder is there, or can be made, and is its owner's alone."""
    name = "cache folder"
    if not cache_dir.is_dir():
        if cache_dir.exists():
            return fail(name, f"{cache_dir} is no folder", "give another cache_dir")
        return ok(name, f"{cache_dir} will be made")
    found = cache_dir.stat()
    if found.st_uid != os.geteuid():
        return fail(
            name, f"{cache_dir} belongs to user {found.st_uid}", "run as that user, or give another cache_dir"
        )
    if found.st_mode & 0o077:
        return warn(
            name,
            f"{cache_dir} can be read by others: it holds what is in images",
            f"`chmod 0700 {cache_dir}`",
        )
    return ok(name, str(cache_dir))


def space(cache_dir: Path, free_min_bytes: int) -> Finding:
    """Whether there is room."""
    name, found = "cache space", os.statvfs(_nearest(cache_dir))
    free_bytes = found.f_bavail * found.f_frsize
    seen = f"{free_bytes >> 20} MiB free, {free_min_bytes >> 20} of them kept free"
    if free_bytes <= free_min_bytes:
        return warn(
            name, seen, "make room, or lower cache_free_min: until then nothing that is fetched is kept"
        )
    return ok(name, seen)


def file_system(cache_dir: Path, mounts: Path) -> Finding:
    """Whether what is kept there stays."""
    name, kind, where = "cache file system", "", ""
    real = _nearest(cache_dir).resolve()
    for line in mounts.read_text().splitlines():
        # proc_pid_mountinfo(5); the last line of several on one mountpoint is the topmost.
        before, _, after = line.partition(" - ")
        mounted = before.split()[4]
        if (real == Path(mounted) or Path(mounted) in real.parents) and len(mounted) >= len(where):
            where, kind = mounted, after.split()[0]
    if kind in VOLATILE:
        return warn(name, f"{kind}: the cache is lost with a reboot", "put cache_dir on a disk")
    if kind in REMOTE or kind.startswith("fuse"):
        return warn(
            name,
            f"{kind}: slower than a disk, and it fails as one more thing",
            "put cache_dir on a local disk",
        )
    return ok(name, kind or "not known")


def holes(file: IO[bytes]) -> Finding:
    """Whether what is absent takes no room."""
    name = "cache holes"
    os.pwrite(file.fileno(), b"x", HOLE_BYTES)
    if os.fstat(file.fileno()).st_blocks * 512 < HOLE_BYTES:
        return ok(name, "files have holes: an image takes what was fetched of it")
    return fail(name, "files have no holes: each image takes its whole size", "use ext4, xfs or btrfs")


def reads_at_once(file: IO[bytes]) -> Finding:
    """Whether reads of what is in memory need no thread."""
    name = "cache reads"
    os.pwrite(file.fileno(), b"x" * 4096, 0)
    try:
        os.preadv(file.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError as exc:
        return warn(
            name,
            f"RWF_NOWAIT: {exc.strerror}: each read takes a thread",
            "use ext4, xfs or btrfs to be faster",
        )
    return ok(name, "what is in memory is read at once (RWF_NOWAIT)")


def syncs(file: IO[bytes]) -> Finding:
    """How long it takes to make something durable."""
    name, times = "cache syncs", []
    for number in range(SYNCS):
        os.pwrite(file.fileno(), b"x" * SYNC_BYTES, number * SYNC_BYTES)
        began_s = time.monotonic()
        os.fdatasync(file.fileno())
        times.append(time.monotonic() - began_s)
    median_s = statistics.median(times)
    seen = f"{median_s * 1000:.1f} ms for {SYNC_BYTES >> 10} KiB"
    if median_s > SYNC_SLOW_S:
        return warn(
            name, seen, "a crash would cost more fetching; look at the disk, or put cache_dir on another"
        )
    return ok(name, seen)


def _on_a_file(name: str, cache_dir: Path, check: Callable[[IO[bytes]], Finding]) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=_nearest(cache_dir)) as file:
            return check(file)
    except OSError as exc:
        return fail(
            name, f"{_nearest(cache_dir)} cannot be written: {exc.strerror}", "mend the disk, or give another"
        )


def _nearest(path: Path) -> Path:
    """Return the folder itself, or the nearest above it that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path
