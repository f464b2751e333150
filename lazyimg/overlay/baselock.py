"""One at a time for each base, across processes: the lock file Nova uses, so that the two never race.

It is `<parent of the mount>/locks/nova-<base name>` (nova.utils.synchronized with its instances_path), owned
as that parent is: made by root and left so, nova-compute could not open it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyimg.errors import InUse, LazyImgError

# As long as a read of the base may take (read_timeout), twice.
LOCK_TIMEOUT_S = 600.0


@contextmanager
def base_lock(base_path: Path) -> Iterator[None]:
    """Hold the lock of a base inside the block.  Raises InUse if another process keeps it too long."""
    from fasteners import InterProcessLock  # type: ignore[import-untyped]  # it has no annotations

    path = base_path.parent.parent / "locks" / f"nova-{base_path.name}"
    try:
        _make_lock_file(path)
        lock = InterProcessLock(path)
        is_held = lock.acquire(timeout=LOCK_TIMEOUT_S)
    except (OSError, RuntimeError) as exc:
        reason = getattr(exc, "strerror", None) or str(exc)
        raise LazyImgError(
            f"lock {path}: {reason}; run as root or as the owner of {path.parent.parent}"
        ) from exc
    if not is_held:
        # fasteners leaves it open when it gives up.
        lock.lockfile.close()
        raise InUse(
            f"lock {path}: another process has kept it for {LOCK_TIMEOUT_S:.0f} s; see who with fuser"
        )
    try:
        yield
    finally:
        lock.release()


def _make_lock_file(path: Path) -> None:
    owner = path.parent.parent.stat()
    if not path.parent.exists():
        with suppress(FileExistsError):
            path.parent.mkdir(0o755)
            _own_as(path.parent, owner)
    if path.exists():
        return
    # Owned before it has its name: nova-compute may look for it at any moment.
    hidden = path.parent / f".nova-{secrets.token_hex(6)}"
    try:
        os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        _own_as(hidden, owner)
        with suppress(FileExistsError):
            os.link(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def _own_as(path: Path, owner: os.stat_result) -> None:
    # Only root can give a file away; anybody else works here as the owner already.
    if os.geteuid() == 0:
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
