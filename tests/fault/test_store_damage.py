"""A disk that fails, and bytes lost, cut off or exchanged under the store: damage is told, never returned."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from spoiled_cache import COUNT, SIZE_BYTES, WHOLE, check_and_refill, fill, opened, write
from store_images import chunks_content, content, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ChunkDamaged, ChunkUnreadable
from lazyimg.store.cachedir import CacheDir


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], contextlib.AbstractContextManager[object]]:
    """Return `failing(name)`: within it os.<name> fails with EIO, as a dying disk's would."""
    return lambda name: mock.patch.object(os, name, side_effect=OSError(errno.EIO, "injected"))


def test_failed_sync_makes_its_chunks_absent(
    path: Path, failing: Callable[[str], contextlib.AbstractContextManager[object]]
) -> None:
    """Invariant 2: bytes that fdatasync could not vouch for do not count, now or after a restart."""
    with opened(path) as (_, file):
        write(file, 0, 2)
        file.commit()
        write(file, 2, 3)
        with failing("fdatasync"), pytest.raises(OSError, match="injected"):
            file.commit()
        assert file.absent(range(6)) == [2, 3, 4, 5]
        assert (file.present_count, file.commit()) == (2, 0)
    with opened(path) as (_, file):
        assert file.absent(range(3)) == [2]
        check_and_refill(file)


def test_unreadable_chunk_stays_until_it_is_dropped(
    path: Path, failing: Callable[[str], contextlib.AbstractContextManager[object]]
) -> None:
    """A chunk that the disk cannot read, proven or not, may be readable later: it is given up only when told to."""
    fill(path)
    with opened(path) as (_, file):
        file.read(0, CHUNK)
        for chunk in (0, 1):
            with failing("pread"), failing("preadv"):
                assert file.read_nowait(chunk * CHUNK, chunk * CHUNK + 9) is None
                with pytest.raises(ChunkUnreadable) as caught:
                    file.read(chunk * CHUNK, chunk * CHUNK + 9)
            assert caught.value.chunks == [chunk]
            assert file.read(chunk * CHUNK, chunk * CHUNK + 9) == WHOLE[chunk * CHUNK :][:9]
        assert file.absent(range(3)) == []
        file.drop([0, 1])
        check_and_refill(file)


def test_bytes_lost_before_their_commit_are_never_returned(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """Invariant 1: the kernel may lose a page before the commit; the zeros beneath are never read."""
    expected_warnings("2 damaged chunks dropped")
    with opened(path) as (_, file):
        write(file, 0, 3)
        assert file.read_nowait(0, 3 * CHUNK) == content(1, 0, 3 * CHUNK)
        with file.path.open("r+b") as hand:
            hand.write(bytes(2 * CHUNK))
        assert file.read_nowait(0, 9) is None
        with pytest.raises(ChunkDamaged) as caught:
            file.read(0, 3 * CHUNK)
        assert caught.value.chunks == [0, 1]
        check_and_refill(file)


def test_file_cut_short_under_a_reader_returns_no_short_read(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """A chunk file that shrinks while open is damaged where it ends, proven or not."""
    expected_warnings("damaged chunks dropped")
    with opened(path) as (_, file):
        write(file, 0, COUNT)
        file.commit()
        os.truncate(file.path, 5 * CHUNK + 1)
        assert file.read_nowait(5 * CHUNK, 6 * CHUNK) is None
        with pytest.raises(ChunkDamaged) as caught:
            file.read(5 * CHUNK, 7 * CHUNK)
        assert caught.value.chunks == [5, 6]
        checked, damaged = file.verify()
        assert (checked, damaged) == (COUNT - 2, list(range(7, COUNT)))
        check_and_refill(file)


def test_bytes_of_another_image_are_never_returned(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """Invariant 1: another image's chunk file copied over this one's, same name and size, is all damaged."""
    expected_warnings("damaged chunks dropped")
    mine = fill(path)
    cache = CacheDir(path)
    other = open_new(cache, 2, SIZE_BYTES)
    other.write(0, chunks_content(2, 0, COUNT, SIZE_BYTES))
    other.commit()
    cache.close()
    shutil.copy(other.path, mine)
    with opened(path) as (_, file):
        assert file.path == mine
        with pytest.raises(ChunkDamaged) as caught:
            file.read(0, SIZE_BYTES)
        assert caught.value.chunks == list(range(COUNT))
        check_and_refill(file)
