"""The disk that fails on request must itself be trusted: it passes all on, strikes what it is told to, and no more.

Expected:

    healthy         what is written is read; SQLite in WAL mode and a CacheDir work on it
    struck          the named operations on the named paths fail, the given number of times; others do not
    hanging         the operations wait, others go on, and after `heal` they are done
"""

from __future__ import annotations

import errno
import os
import threading
from contextlib import closing

import pytest
from faulty_disk import CHANGES, SYNCS, FaultyDisk
from real_mount import wait_until
from store_images import chunks_content, content, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.store.cachedir import CacheDir

pytestmark = pytest.mark.slow

SIZE_BYTES = 3 * CHUNK + 5


def test_healthy_disk_carries_a_cache(faulty_disk: FaultyDisk) -> None:
    """A cache folder on it, SQLite's files included, is what it is on any disk."""
    for _ in range(2):
        with closing(CacheDir(faulty_disk.path / "cache")) as cache:
            if not cache.index.entries():
                file = open_new(cache, 1, SIZE_BYTES)
                file.write(0, chunks_content(1, 0, 4, SIZE_BYTES))
                assert file.commit() == 4
            else:
                file = cache.open_image(cache.index.entries()[0].key)
            assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
    assert (faulty_disk.lower / "cache" / "chunks" / file.path.name).read_bytes() == content(1, 0, SIZE_BYTES)


def test_struck_operations_fail_and_no_others(faulty_disk: FaultyDisk) -> None:
    """Operation, path and count select what fails; all is well after `heal`."""
    for name in ("one", "two"):
        (faulty_disk.path / name).write_bytes(b"before")
    faulty_disk.strike("read", path="one", error=errno.EIO, count=1)
    assert (faulty_disk.path / "two").read_bytes() == b"before"
    with pytest.raises(OSError, match="Input/output error"):
        (faulty_disk.path / "one").read_bytes()
    assert (faulty_disk.path / "one").read_bytes() == b"before"
    faulty_disk.strike(*CHANGES, *SYNCS, error=errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        (faulty_disk.path / "three").touch()
    with (faulty_disk.path / "two").open("r+b", buffering=0) as file:
        with pytest.raises(OSError, match="Read-only"):
            file.write(b"after")
        with pytest.raises(OSError, match="Read-only"):
            os.fsync(file.fileno())
    assert faulty_disk.struck == 4
    faulty_disk.heal()
    (faulty_disk.path / "two").write_bytes(b"after")
    assert (faulty_disk.lower / "two").read_bytes() == b"after"


def test_hanging_operations_wait_until_healed(faulty_disk: FaultyDisk) -> None:
    """Twenty reads hang without keeping a write waiting, and are done when the disk is well again."""
    (faulty_disk.path / "file").write_bytes(b"content")
    faulty_disk.strike("read", path="file", hang=True)
    seen: list[bytes] = []
    readers = [
        threading.Thread(target=lambda: seen.append((faulty_disk.path / "file").read_bytes()))
        for _ in range(20)
    ]
    for reader in readers:
        reader.start()
    wait_until(lambda: faulty_disk.hanging == 20, "twenty hanging reads", 20)
    (faulty_disk.path / "other").write_bytes(b"written meanwhile")
    assert seen == []
    faulty_disk.heal()
    for reader in readers:
        reader.join(20)
    assert seen == [b"content"] * 20
