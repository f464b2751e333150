"""What somebody plants in the cache folder, or in its place, leads no read or write of ours elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from store_images import chunks_content, content, image_entry, store_whole

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import CacheUnusable
from lazyimg.store.cachedir import CacheDir

SIZE_BYTES = 3 * CHUNK
KEY = image_entry(1, SIZE_BYTES).key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("name", ["chunks", "sidecars", "aside", "index"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_stands_in_a_folders_place_is_refused(path: Path, tmp_path: Path, name: str, kind: str) -> None:
    """A link planted for one of our folders leads nowhere: the start is refused and names it."""
    CacheDir(path).close()
    target = tmp_path / "target"
    (path / name).rename(target)
    if kind == "link":
        (path / name).symlink_to(target)
    else:
        (path / name).write_text("")
    before = sorted(target.rglob("*"))
    with pytest.raises(CacheUnusable, match=f"{name} is not a folder; remove it"):
        CacheDir(path)
    assert sorted(target.rglob("*")) == before


@pytest.mark.parametrize("name", ["lock", "version"])
@pytest.mark.parametrize("kind", ["link", "hard link", "pipe"])
def test_planted_file_is_refused_and_its_target_left_alone(
    path: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """A lock or version that is another name of some file is refused before that file is changed."""
    CacheDir(path).close()
    target = tmp_path / "target"
    target.write_text("1\n")
    (path / name).unlink()
    match kind:
        case "link":
            (path / name).symlink_to(target)
        case "hard link":
            os.link(target, path / name)
        case "pipe":
            os.mkfifo(path / name)
    with pytest.raises(CacheUnusable, match="make it usable or give another"):
        CacheDir(path)
    assert target.read_text() == "1\n"


@pytest.mark.parametrize("name", ["cache.db", "cache.db-wal", "cache.db-shm"])
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_planted_index_is_set_aside(
    path: Path, tmp_path: Path, name: str, kind: str, expected_warnings: Callable[..., None]
) -> None:
    """SQLite follows links: an index with any is set aside unopened, and rebuilt."""
    expected_warnings(
        "cache index set aside: .*it (is not a regular file|has another name)", "rebuilt from sidecars"
    )
    cache = CacheDir(path)
    store_whole(cache, 1, SIZE_BYTES)
    cache.close()
    target, planted = tmp_path / "target", path / "index" / name
    target.write_bytes(planted.read_bytes() if planted.exists() else b"")
    before = target.read_bytes()
    planted.unlink(missing_ok=True)
    planted.symlink_to(target) if kind == "link" else os.link(target, planted)
    cache = CacheDir(path)
    assert cache.open_image(KEY).read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
    assert cache.statistics().set_aside == 1
    cache.close()
    assert target.read_bytes() == before


def test_planted_sidecar_is_not_written_through(path: Path, tmp_path: Path, cache: CacheDir) -> None:
    """A link or a second name in place of a sidecar leads no write of ours elsewhere."""
    store_whole(cache, 1, SIZE_BYTES)
    targets = [tmp_path / "one", tmp_path / "two"]
    (sums,) = path.glob("sidecars/*.sums")
    (entry,) = path.glob("sidecars/*.entry")
    for target in targets:
        target.write_bytes(b"untouched")
    for planted in (sums, entry):
        planted.unlink()
    sums.symlink_to(targets[0])
    os.link(targets[1], entry)
    file = cache.open_image(KEY)
    file.drop([1])
    file.write(1, chunks_content(1, 1, 1, SIZE_BYTES))
    file.commit()
    cache.index.put(image_entry(1, SIZE_BYTES))
    assert [target.read_bytes() for target in targets] == [b"untouched"] * 2
    assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


def test_folder_that_is_swapped_while_open_is_still_ours(path: Path, tmp_path: Path) -> None:
    """Who renames the cache folder and puts another in its place does not lead us there."""
    cache = CacheDir(path)
    store_whole(cache, 1, SIZE_BYTES)
    path.rename(tmp_path / "away")
    (path / "chunks").mkdir(parents=True)
    (path / "sidecars").mkdir()
    file = cache.open_image(KEY)
    assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
    cache.remove_image(KEY)
    assert list((tmp_path / "away" / "chunks").iterdir()) == []
    assert sorted(one.name for one in path.rglob("*")) == ["chunks", "sidecars"]
    cache.close()


def test_folder_that_anybody_may_swap_is_refused(tmp_path: Path) -> None:
    """Above the cache nobody else may rename folders; /tmp and its like, where each renames his own, will do."""
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o777)
    with pytest.raises(CacheUnusable, match=f"anybody may swap it in {parent}; run: chmod o-w {parent}"):
        CacheDir(parent / "between" / "cache")
    parent.chmod(0o1777)
    CacheDir(parent / "between" / "cache").close()


def test_folder_others_may_write_is_refused(path: Path) -> None:
    """A folder of ours that others could plant files in is refused, too."""
    CacheDir(path).close()
    (path / "chunks").chmod(0o777)
    with pytest.raises(CacheUnusable, match="chunks can be written by others; run: chmod go-w"):
        CacheDir(path)
