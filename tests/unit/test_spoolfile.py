"""The file that a source is kept in: it gives back what it was given, or an error, and leaves nothing behind."""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyimg.store import spoolfile
from lazyimg.store.folder import PrivateFolder
from lazyimg.store.spoolfile import BLOCK_BYTES, SpoolFile, Spools

SOURCE = random.Random(1).randbytes(5 * BLOCK_BYTES + 1234)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SpoolFile]:
    one = SpoolFile(tmp_path, "sha256")
    yield one
    one.close()


def fill(file: SpoolFile, step_bytes: int = 50_000) -> None:
    for start in range(0, len(SOURCE), step_bytes):
        file.append(start, SOURCE[start : start + step_bytes])


def test_what_was_appended_is_read(file: SpoolFile) -> None:
    """Any range that has come is read as it came, at and across the bounds of blocks, and hashed in its order."""
    fill(file)
    assert file.size_bytes == len(SOURCE)
    assert file.hexdigest() == hashlib.sha256(SOURCE).hexdigest()
    bounds = [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 1, 5 * BLOCK_BYTES, len(SOURCE)]
    for start in bounds:
        for stop in bounds:
            if start < stop:
                assert file.read(start, stop) == SOURCE[start:stop]


def test_what_is_here_already_is_passed_over(file: SpoolFile) -> None:
    """A stream that begins again changes nothing of what came before, and its hash is of each byte once."""
    file.append(0, SOURCE[:70_000])
    file.append(0, SOURCE[:50_000])
    file.append(50_000, SOURCE[50_000:])
    assert file.read(0, len(SOURCE)) == SOURCE
    assert file.hexdigest() == hashlib.sha256(SOURCE).hexdigest()


def test_failed_append_leaves_all_as_it_was(file: SpoolFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I1] Of an append that the disk failed nothing counts, and it can be made again."""
    file.append(0, SOURCE[:100_000])

    def full(fd: int, at: int, data: memoryview) -> None:
        os.pwrite(fd, b"torn", at)
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(spoolfile, "_write", full)
        with pytest.raises(OSError, match="full"):
            file.append(100_000, SOURCE[100_000:])
    assert file.size_bytes == 100_000
    assert file.read(0, 100_000) == SOURCE[:100_000]
    fill(file)
    assert file.read(0, len(SOURCE)) == SOURCE
    assert file.hexdigest() == hashlib.sha256(SOURCE).hexdigest()


@pytest.mark.parametrize("harm", ["changed", "short"])
def test_what_the_disk_lost_is_an_error(file: SpoolFile, harm: str) -> None:
    """[I1] A block that is not what was written to it is never returned; the others are."""
    fill(file)
    if harm == "changed":
        os.pwrite(file._fd, bytes(100), 4 * BLOCK_BYTES + 5)
    else:
        os.truncate(file._fd, 4 * BLOCK_BYTES + 5)
    with pytest.raises(OSError, match="not what was written"):
        file.read(3 * BLOCK_BYTES, len(SOURCE))
    assert file.read(0, 4 * BLOCK_BYTES) == SOURCE[: 4 * BLOCK_BYTES]


def test_closed_file_is_an_error(file: SpoolFile) -> None:
    """Once closed it is neither read nor appended to, takes no room, and its number is another file's."""
    fill(file)
    file.close()
    file.close()
    with pytest.raises(OSError, match="closed"):
        file.read(0, 1)
    with pytest.raises(OSError, match="closed"):
        file.append(0, b"x")
    assert file.allocated_bytes() == 0


def test_descriptor_outlives_its_last_user(file: SpoolFile) -> None:
    """A file that is closed while a thread reads it is closed when that is done, not under it."""
    fill(file)
    with file._in_use() as fd:
        file.close()
        assert os.fstat(fd).st_nlink == 0
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


def test_spools_leave_no_names(tmp_path: Path) -> None:
    """[I5] Files have no names, count as long as they are open, and an image has one at most."""
    folder = PrivateFolder.open(tmp_path / "chunks")
    spools = Spools(folder)
    first = spools.open("key", None)
    fill(first)
    assert folder.names() == []
    assert spools.allocated_bytes("key") >= 5 * BLOCK_BYTES
    assert first.hexdigest() is None
    second = spools.open("key", None)
    assert first.is_closed
    spools.close_all()
    assert second.is_closed
    assert spools.allocated_bytes("key") == 0
    folder.close()
