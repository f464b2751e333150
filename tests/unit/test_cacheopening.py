"""A daemon's cache as the last daemon left it: what that could not store is stored, or it stands aside."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from store_images import image_entry

from lazyimg.config import Config
from lazyimg.daemon.cacheopening import CacheOpening
from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.lastentries import LastEntries
from lazyimg.errors import CacheUnusable, InUse
from lazyimg.image.states import JUDGING, QUARANTINED
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index

ENTRY = image_entry(1, 1 << 20)


@pytest.fixture
def table() -> Iterator[int]:
    fd = make_table()
    yield fd
    os.close(fd)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(endpoint=("http://127.0.0.1:9",), cache_dir=tmp_path / "cache", control=tmp_path / "c.sock")


@pytest.fixture
def opening(table: int, config: Config) -> Callable[..., CacheOpening]:
    """Return what makes the opening of one daemon after the other."""

    def make(*, is_last_dying: bool = False) -> CacheOpening:
        return CacheOpening(config, LastEntries(table), Handles(table), is_last_dying=is_last_dying)

    return make


async def stored(opening: Callable[..., CacheOpening]) -> list[ImageEntry]:
    """Open the cache as the next daemon would, and return its index."""
    with closing(await opening().open()) as cache:
        return cache.index.entries()


async def test_what_a_disk_did_not_take_is_stored_by_the_next_daemon(
    opening: Callable[..., CacheOpening], table: int, config: Config
) -> None:
    """[I1] A quarantine that the last daemon could not note is one from the start; what the store owns stays."""
    verified = replace(ENTRY, verified=True)
    with closing(CacheDir(config.cache_dir)) as cache:
        cache.index.put(verified)
        known = cache.index.begin(ENTRY.key, "0123456789abcdef")
    changed = replace(verified, state=QUARANTINED, reason="not Glance's", mtime_ns=7, in_use=True)
    LastEntries(table).keep([changed])
    expected = replace(changed, generation=known.generation, verified=False)
    assert await stored(opening) == [expected]


async def test_image_that_the_index_lost_is_known_while_it_is_open(
    opening: Callable[..., CacheOpening], table: int
) -> None:
    """[I9] Of images that the index does not know, those come back that a guest has open, without any chunk."""
    dropped, judging = image_entry(2, 4096), replace(image_entry(3, 4096), state=JUDGING)
    present = replace(ENTRY, generation="0123456789abcdef", present_count=16, verified=True)
    LastEntries(table).keep([present, dropped, judging])
    for one in (ENTRY, judging):
        Handles(table).opened(one.record.inode(one.view))
    assert await stored(opening) == [ENTRY]


async def test_index_that_takes_no_change_is_used_all_the_same(
    opening: Callable[..., CacheOpening],
    table: int,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    expected_warnings: Callable[..., None],
) -> None:
    """[I6] A disk that may be read and fails a write at the start keeps nobody waiting."""
    expected_warnings("is not stored yet")
    with closing(CacheDir(config.cache_dir)) as cache:
        cache.index.put(ENTRY)
    LastEntries(table).keep([replace(ENTRY, mtime_ns=7)])

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(Index, "put", fail)
    assert await stored(opening) == [ENTRY]


async def test_cache_of_a_mount_that_begins_is_not_stood_in_for(
    opening: Callable[..., CacheOpening], config: Config
) -> None:
    """Nobody depends on a first daemon yet: what is wrong is said, and nothing is left."""
    config.cache_dir.write_text("not a folder")
    with pytest.raises(CacheUnusable, match=r"cache: File exists; make it usable"):
        await opening().open()
    assert os.listdir(config.cache_dir.parent) == ["cache"]


async def test_stand_in_knows_the_images_and_stores_nothing(
    opening: Callable[..., CacheOpening], table: int, config: Config, expected_warnings: Callable[..., None]
) -> None:
    """[I9] In place of a cache that cannot be opened: all images by their inodes, none of their bytes."""
    expected_warnings("not used from here on")
    LastEntries(table).keep([ENTRY, replace(image_entry(3, 4096), state=JUDGING)])
    config.cache_dir.write_text("not a folder")
    one = opening()
    with closing(await one.open()) as cache:
        assert [entry.key for entry in cache.index.entries()] == [ENTRY.key]
        assert cache.index.entries()[0].present_count == 0
        assert (one.disk.may_read, one.disk.may_write) == (False, False)
        assert "File exists" in str(one.disk.statistics().last_error)
        assert cache.open_image_unseen(ENTRY.key) is not None
    one.remove_stand_in()
    assert os.listdir(config.cache_dir.parent) == ["cache"]


async def test_lock_of_a_dying_daemon_is_no_other_users(
    opening: Callable[..., CacheOpening], table: int, config: Config, expected_warnings: Callable[..., None]
) -> None:
    """[I6] A cache that another process uses is refused, but where that is the last daemon, which hangs in its end."""
    LastEntries(table).keep([ENTRY])
    with closing(CacheDir(config.cache_dir)):
        with pytest.raises(InUse, match="is used by process"):
            await opening().open()
        expected_warnings("not used from here on")
        one = opening(is_last_dying=True)
        with closing(await one.open()) as cache:
            assert cache.path != config.cache_dir
        one.remove_stand_in()


async def test_cache_that_nobody_waits_for_any_more_is_given_back(
    opening: Callable[..., CacheOpening], table: int, config: Config, expected_warnings: Callable[..., None]
) -> None:
    """An open that hung and ends later leaves the cache to the next daemon."""
    expected_warnings("not used from here on")
    LastEntries(table).keep([ENTRY])
    config.cache_dir.write_text("not a folder")
    one = opening()
    with closing(await one.open()):
        config.cache_dir.unlink()
        one.open_cache()
        CacheDir(config.cache_dir).close()
    one.remove_stand_in()
