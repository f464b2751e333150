"""The base: an image's file under the mount, read so that a stalled mount can be left, and judged.

The kernel lets nothing but SIGKILL out of a FUSE read that has been taken, so every call that can reach the
daemon is made in a thread which an interrupt leaves behind; the process's end takes it along.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lazyimg.control import ImageFacts
from lazyimg.core.header import HEAD_SIZE_BYTES, Verdict, judge
from lazyimg.core.identity import ImageRecord, base_name
from lazyimg.errors import ImageRefused, LazyImgError, MountFailed

T = TypeVar("T")

# One FUSE request at the usual read-ahead, and a sign of life each time.
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Base:
    """An image's file under the mount, found to be what the daemon says it is."""

    facts: ImageFacts
    path: Path
    verdict: Verdict


def locate(facts: ImageFacts, base_dir: Path | None) -> Path:
    """Return the path of an image's base: below `base_dir`, or where the daemon says the mount is."""
    if facts.base_name != base_name(facts.id):
        raise LazyImgError(f"image {facts.id}: the daemon calls it {facts.base_name!r}; update lazyimg")
    # qemu needs it absolute: a relative backing file is relative to the overlay, and in a relative name a
    # colon would mean a protocol.
    return Path(os.path.abspath(base_dir or facts.mountpoint)) / facts.base_name


def judge_base(facts: ImageFacts, path: Path) -> Base:
    """Judge a base's header through the mount, as what Glance and the daemon say it is.

    Raises ImageRefused, MountFailed where there is no such file, LazyImgError where it cannot be read.
    """
    with reading(path):
        found = in_thread(lambda: os.stat(path))
        if not stat.S_ISREG(found.st_mode) or found.st_size != facts.presented_size_bytes:
            raise MountFailed(
                f"base {path}: {found.st_size} bytes, the daemon presents {facts.presented_size_bytes};"
                " give the mount with --base-dir, or remove the file that took its place"
            )
        head = in_thread(lambda: _read_head(path))
    verdict = judge(head, _presented_record(facts), "stored")
    if verdict.presented_format != facts.presented_format:
        raise ImageRefused(
            f"image {facts.id}: its content is {verdict.presented_format}, the daemon presents"
            f" {facts.presented_format}; restart the daemon"
        )
    return Base(facts, path, verdict)


def touch(base: Base) -> None:
    """Set the base's mtime to now, as Nova does at each use: its cache manager removes what is not used."""
    try:
        in_thread(lambda: os.utime(base.path))
    except OSError:
        # Nova ignores EACCES here; the file stays usable whatever the reason.
        return


def read_all(path: Path) -> Iterator[bytes]:
    """Yield a base's bytes in pieces of at most READ_BYTES; OSError is turned into LazyImgError."""
    with reading(path):
        descriptor = in_thread(lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        try:
            offset = 0
            while data := in_thread(lambda: os.pread(descriptor, READ_BYTES, offset)):  # noqa: B023 (awaited at once)
                yield data
                offset += len(data)
        finally:
            # close() asks the daemon too; nothing depends on its outcome, so it is not waited for.
            threading.Thread(target=os.close, args=(descriptor,), daemon=True).start()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of a base into an error that names it and the next step."""
    try:
        yield
    except FileNotFoundError as exc:
        raise MountFailed(
            f"base {path}: not there; mount lazyimg on {path.parent}, or give the mount with --base-dir"
        ) from exc
    except OSError as exc:
        raise LazyImgError(
            f"base {path}: {exc.strerror}; see lazyimg status and the daemon's log, then try again"
        ) from exc


def in_thread(call: Callable[[], T]) -> T:
    """Return what `call` returns or raise what it raises; a signal's exception leaves it running."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as exc:
            outcome.set_exception(exc)

    # No executor: its threads are joined when the process ends.
    threading.Thread(target=run, daemon=True).start()
    return outcome.result()


def _read_head(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = b""
        while len(head) < HEAD_SIZE_BYTES:
            data = os.pread(descriptor, HEAD_SIZE_BYTES - len(head), len(head))
            if not data:
                break
            head += data
        return head
    finally:
        os.close(descriptor)


def _presented_record(facts: ImageFacts) -> ImageRecord:
    """Return the record of the bytes as presented: a qcow2 image shown as raw is judged as raw."""
    is_decoded = facts.disk_format == "qcow2" and facts.presented_format == "raw"
    return ImageRecord(
        id=facts.id,
        name=facts.name,
        status="active",
        size_bytes=facts.presented_size_bytes,
        disk_format="raw" if is_decoded else facts.disk_format,
        container_format=facts.container_format,
    )
