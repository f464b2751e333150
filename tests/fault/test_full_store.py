"""The cache's disk is full, or a write is cut short: what is stored is served, and space that comes back is used."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from spoiled_cache import COUNT, KEY, check_and_refill, opened, write
from store_images import content

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import CacheUnusable
from lazyimg.store.cachedir import CacheDir


@pytest.fixture
def small_disk(tmp_path: Path, require: Callable[..., None]) -> Iterator[Path]:
    """A file system of 2 MiB."""
    require("mount", "umount")
    if os.geteuid() != 0:
        pytest.skip("root is missing here: a small file system cannot be mounted")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk_leaves_chunks_absent_and_the_rest_readable(small_disk: Path) -> None:
    """ENOSPC reaches the caller; what was stored before is served, and space that comes back is used."""
    ballast = small_disk / "ballast"
    with opened(small_disk / "cache") as (_, file):
        write(file, 0, 2)
        file.commit()
        with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="No space left") as caught:
            write(file, 2, COUNT - 2)
        assert caught.value.errno == errno.ENOSPC
        assert file.absent(range(COUNT)) == list(range(2, COUNT))
        assert file.read(0, 2 * CHUNK) == content(1, 0, 2 * CHUNK)
        ballast.unlink()
        check_and_refill(file)


def test_full_disk_fails_the_commit_and_keeps_the_chunks_for_the_next(small_disk: Path) -> None:
    """An index that cannot grow fails the commit; its chunks are served and committed later."""
    ballast = small_disk / "ballast"
    with opened(small_disk / "cache") as (cache, file):
        write(file, 0, 2)
        with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(OSError, match="cache index") as caught:
            file.commit()
        assert caught.value.errno == errno.ENOSPC
        assert file.written_count == 2
        assert file.read(0, 2 * CHUNK) == content(1, 0, 2 * CHUNK)
        ballast.unlink()
        file.commit()
        cache.close_image(KEY)
        assert cache.open_image(KEY).absent(range(3)) == [2]


def test_cache_on_a_full_disk_is_refused_in_one_line(small_disk: Path) -> None:
    """A new cache that has no room is refused with the reason, and opens once there is room."""
    ballast = small_disk / "ballast"
    with ballast.open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(bytes(4096)):
            pass
    with pytest.raises(CacheUnusable, match="make it usable or give another"):
        CacheDir(small_disk / "cache")
    ballast.unlink()
    with opened(small_disk / "cache") as (_, file):
        check_and_refill(file)


def test_write_that_is_cut_short_leaves_no_half_chunk(tmp_path: Path) -> None:
    """A limit in the middle of a chunk fails the write, and none of its chunks is taken for present."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(tmp_path / "cache") as (_, file):
        write(file, 0, 1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 * CHUNK + 1000, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                write(file, 1, COUNT - 1)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert file.absent(range(COUNT)) == list(range(1, COUNT))
        check_and_refill(file)
