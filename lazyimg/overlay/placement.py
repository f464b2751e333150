"""Files that appear together under their final names, whole and durable, or not at all.

Each is made under a hidden name in its final folder and linked into place at the end: link(2), unlike rename,
refuses a name that somebody took meanwhile.  Whatever ends the block early, a signal's exception included,
removes all of it again.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyimg.errors import DestinationRefused


class Placement:
    """One set of files to appear together; use as a context manager and end the block with `commit`."""

    def __init__(self) -> None:
        self._staged: list[tuple[Path, Path]] = []
        self._folders: list[Path] = []
        self._is_committed = False

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_exc: object) -> None:
        if not self._is_committed:
            self._withdraw()
        for hidden, _ in self._staged:
            _unlink(hidden)
        if not self._is_committed:
            for folder in self._folders:
                # Not empty: somebody else has put a file there, which is not ours to remove.
                with suppress(OSError):
                    folder.rmdir()

    def make_folder(self, folder: Path) -> None:
        """Make a folder unless it is there; one that was made goes again unless `commit` is reached."""
        with refusing(folder):
            # Noted first: an interrupt between the two must not leave it behind.  A folder of somebody else's
            # is never in this list, and one with files in it is never removed.
            if not os.path.lexists(folder):
                self._folders.append(folder)
                folder.mkdir()
            elif not folder.is_dir():
                raise DestinationRefused(f"destination {folder}: not a folder; give another")

    def stage(self, final: Path) -> Path:
        """Return the hidden path to make `final` at.  Raises DestinationRefused if `final` exists."""
        if os.path.lexists(final):
            raise _exists(final)
        hidden = final.parent / f".lazyimg-{secrets.token_hex(6)}.part"
        with refusing(final):
            # Made here, so that a folder that is missing or not writable is named before any work.
            self._staged.append((hidden, final))
            os.close(os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        return hidden

    def commit(self) -> None:
        """Make all files durable and let them appear.  Raises DestinationRefused if a name is taken."""
        for hidden, final in self._staged:
            with refusing(final):
                sync(hidden)
        for hidden, final in self._staged:
            try:
                with refusing(final):
                    os.link(hidden, final)
            except DestinationRefused as exc:
                if isinstance(exc.__cause__, FileExistsError):
                    raise _exists(final) from exc
                raise
        folders = {final.parent for _, final in self._staged} | {folder.parent for folder in self._folders}
        for folder in sorted(folders):
            with refusing(folder):
                sync(folder)
        self._is_committed = True

    def _withdraw(self) -> None:
        for hidden, final in self._staged:
            # Only a link to our own file: another's of that name is why we are here.
            with suppress(OSError):
                if os.path.samestat(hidden.lstat(), final.lstat()):
                    final.unlink()


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Turn an OSError at a destination into DestinationRefused naming it."""
    try:
        yield
    except OSError as exc:
        raise DestinationRefused(f"destination {path}: {exc.strerror}; give another, or make room") from exc


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's names, durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exists(final: Path) -> DestinationRefused:
    return DestinationRefused(f"destination {final}: it exists; give another, or remove it")


def _unlink(path: Path) -> None:
    # It may never have been made, or its folder is gone with it.
    with suppress(OSError):
        path.unlink()
