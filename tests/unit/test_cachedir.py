"""The cache folder: who may use it, and what of its content is trusted."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from store_images import chunks_content, content, image_entry, open_new, store_whole

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import CacheUnusable, InUse
from lazyimg.store import aside
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.folder import PrivateFolder

SIZE_BYTES = 3 * CHUNK
KEY = image_entry(1, SIZE_BYTES).key


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_folder_is_made_private(path: Path) -> None:
    """Folder and chunk files are nobody else's to read, also where the folder was there before."""
    path.mkdir()
    path.chmod(0o755)
    cache = CacheDir(path)
    assert path.stat().st_mode & 0o777 == 0o700
    assert store_whole(cache, 1, SIZE_BYTES).stat().st_mode & 0o777 == 0o600
    assert (path / "version").read_text() == "1\n"
    cache.close()


def test_second_daemon_is_refused_with_the_firsts_pid(path: Path, cache: CacheDir) -> None:
    """A locked folder names who holds it."""
    with pytest.raises(InUse, match=f"{path} is used by process {os.getpid()};"):
        CacheDir(path)


def test_lock_can_be_handed_over(path: Path) -> None:
    """A copy of the lock's descriptor keeps others out, and opens the folder for who has it."""
    first = CacheDir(path)
    kept = os.dup(first.lock_fd)
    first.close()
    with pytest.raises(InUse):
        CacheDir(path)
    second = CacheDir(path, os.dup(kept))
    second.close()
    os.close(kept)
    CacheDir(path).close()


def test_lock_of_another_folder_is_refused(path: Path, tmp_path: Path) -> None:
    """A descriptor that is not this folder's lock file does not open it."""
    fd = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    with pytest.raises(CacheUnusable, match="not this folder's"):
        CacheDir(path, fd)


def _other_version(path: Path) -> None:
    path.mkdir()
    (path / "version").write_text("2\n")


def _other_files(path: Path) -> None:
    path.mkdir()
    (path / "letters").write_text("dear")


def _writable_by_others(path: Path) -> None:
    path.mkdir()
    path.chmod(0o775)


def _link(path: Path) -> None:
    path.with_name("real").mkdir()
    path.symlink_to("real")


def _plain_file(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_other_version, "is of version '2', later than 1; run the lazyimg that made it"),
        (_other_files, "holds other files; give an empty folder"),
        (_writable_by_others, "can be written by others; run: chmod go-w"),
        (_link, "is a symbolic link"),
        (_plain_file, "File exists; make it usable"),
    ],
)
def test_unfit_folder_is_refused_and_left_alone(
    path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    """A folder that is not a cache of ours gets one line with the next step, and nothing in it changes."""
    spoil(path)
    before = [(found, found.lstat().st_mode) for found in sorted(path.parent.rglob("*"))]
    with pytest.raises(CacheUnusable, match=message) as caught:
        CacheDir(path)
    assert "\n" not in str(caught.value)
    assert [(found, found.lstat().st_mode) for found in sorted(path.parent.rglob("*"))] == before


def test_folder_of_another_owner_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that another user could swap beneath us is not used."""
    path.mkdir()
    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    with pytest.raises(CacheUnusable, match=f"belongs to user {uid}, not {uid + 1}"):
        CacheDir(path)


def test_images_survive_a_restart(path: Path) -> None:
    """A new process finds image, bytes and count."""
    cache = CacheDir(path)
    store_whole(cache, 1, SIZE_BYTES)
    cache.close()
    cache = CacheDir(path)
    file = cache.open_image(KEY)
    assert file.is_whole
    assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)
    assert cache.allocated_bytes(KEY) == file.allocated_bytes >= SIZE_BYTES
    cache.close()


def test_removed_image_is_gone(path: Path) -> None:
    """Entry and bytes go, an open file with them, and the image can come back empty."""
    cache = CacheDir(path)
    store_whole(cache, 1, SIZE_BYTES)
    file = cache.open_image(KEY)
    cache.remove_image(KEY)
    with pytest.raises(OSError, match="closed"):
        file.read(0, 1)
    assert list(path.glob("chunks/*")) == []
    assert (cache.index.entries(), cache.allocated_bytes(KEY)) == ([], 0)
    cache.remove_image(KEY)
    with pytest.raises(KeyError):
        cache.open_image(KEY)
    assert open_new(cache, 1, SIZE_BYTES).present_count == 0
    cache.close()


def test_unknown_chunk_files_are_removed_at_start(path: Path) -> None:
    """What a crash left behind takes no room for ever; what the index knows stays."""
    cache = CacheDir(path)
    known = store_whole(cache, 1, SIZE_BYTES)
    cache.close()
    (path / "chunks" / f"{KEY}.{'0' * 16}").write_bytes(b"left")
    (path / "chunks" / "folder").mkdir()
    CacheDir(path).close()
    assert list(path.glob("chunks/*")) == [known]


def test_file_that_cannot_be_removed_is_not_in_the_way(
    path: Path, expected_warnings: Callable[..., None]
) -> None:
    """What a start cannot tidy away is told, and the cache opens."""
    expected_warnings("chunk file stray, which the index does not know, stays", "sidecar stray, .* stays")
    cache = CacheDir(path)
    known = store_whole(cache, 1, SIZE_BYTES)
    cache.close()
    for folder in ("chunks", "sidecars"):
        (path / folder / "stray").touch()
    with mock.patch.object(PrivateFolder, "remove", side_effect=PermissionError(errno.EPERM, "immutable")):
        cache = CacheDir(path)
    assert cache.open_image(KEY).path == known
    assert cache.statistics().removed_files == 0
    cache.close()


def _missing(file: Path) -> None:
    file.unlink()


def _short(file: Path) -> None:
    os.truncate(file, SIZE_BYTES - 1)


def _hard_linked(file: Path) -> None:
    os.link(file, file.parent.parent.parent / "copy")


def _symlinked(file: Path) -> None:
    target = file.parent.parent.parent / "target"
    file.rename(target)
    file.symlink_to(target)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_missing, "it is missing"),
        (_short, "it has 196607 bytes, not 196608"),
        (_hard_linked, "it has another name"),
        (_symlinked, "it is not a regular file"),
        (_folder, "it is not a regular file"),
    ],
)
def test_untrusted_chunk_file_is_set_aside(
    path: Path,
    cache: CacheDir,
    spoil: Callable[[Path], None],
    problem: str,
    expected_warnings: Callable[..., None],
) -> None:
    """A chunk file that is not what the index says is put aside and a new generation begins, all absent."""
    expected_warnings(f"set aside: {problem}")
    old = store_whole(cache, 1, SIZE_BYTES)
    spoil(old)
    file = cache.open_image(KEY)
    assert file.path != old
    assert (file.present_count, file.absent(range(3))) == (0, [0, 1, 2])
    assert not os.path.lexists(old)
    assert len(list(path.glob("aside/*"))) == (0 if spoil is _missing else 1)
    file.write(0, chunks_content(1, 0, 3, SIZE_BYTES))
    assert file.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


def test_what_is_set_aside_is_bounded(
    path: Path, cache: CacheDir, monkeypatch: pytest.MonkeyPatch, expected_warnings: Callable[..., None]
) -> None:
    """Only the newest of what was set aside are kept, and none that are too large."""
    expected_warnings("set aside")
    monkeypatch.setattr(aside, "ASIDE_COUNT_MAX", 2)
    names = []
    for _ in range(4):
        file = store_whole(cache, 1, SIZE_BYTES)
        _short(file)
        cache.open_image(KEY)
        cache.close_image(KEY)
        names.append(file.name)
    kept = sorted(one.name.rsplit(".", 1)[0] for one in path.glob("aside/*"))
    assert kept == sorted(names[2:])
    monkeypatch.setattr(aside, "ASIDE_BYTES_MAX", CHUNK)
    _short(store_whole(cache, 1, SIZE_BYTES))
    cache.open_image(KEY)
    assert list(path.glob("aside/*")) == []


def test_free_bytes_are_those_of_the_file_system(cache: CacheDir) -> None:
    """Free space is a positive number of bytes below the size of the disk."""
    found = os.statvfs(cache.path)
    assert 0 < cache.free_bytes() < found.f_blocks * found.f_frsize


# ── other versions ──


@pytest.mark.parametrize("version", ["0\n", "", "1", "garbage\n", None])
def test_cache_of_an_older_or_unreadable_version_is_set_aside(
    path: Path, version: str | None, expected_warnings: Callable[..., None]
) -> None:
    """[I2] A cache in a form we do not know is not read, is kept for a human, and is not in the way."""
    expected_warnings("is of another version, set aside")
    cache = CacheDir(path)
    old = store_whole(cache, 1, SIZE_BYTES)
    cache.close()
    (path / "version").unlink() if version is None else (path / "version").write_text(version)
    cache = CacheDir(path)
    assert cache.index.entries() == []
    assert not old.exists()
    assert len(list(path.glob(f"aside/chunks.*/{old.name}"))) == 1
    assert (path / "version").read_text() == "1\n"
    store_whole(cache, 1, SIZE_BYTES)
    cache.close()
    cache = CacheDir(path)
    assert cache.open_image(KEY).is_whole
    cache.close()


def test_folder_of_something_else_is_not_taken_for_an_old_cache(path: Path) -> None:
    """A version that is no number, beside files that are not a cache's, is somebody else's."""
    path.mkdir()
    (path / "version").write_text("release 7\n")
    (path / "index").mkdir()
    (path / "letters").write_text("dear")
    with pytest.raises(CacheUnusable, match="holds other files"):
        CacheDir(path)
    assert sorted(one.name for one in path.iterdir()) == ["index", "letters", "version"]


def test_folder_is_checked_under_who_uses_it(tmp_path: Path) -> None:
    """[I9] Whether the next daemon can go on is asked while the last one has the lock; another version's it cannot."""
    cache = CacheDir(tmp_path / "cache")
    CacheDir.check(tmp_path / "cache")
    (tmp_path / "cache" / "version").write_text("0\n")
    with pytest.raises(CacheUnusable, match="another version"):
        CacheDir.check(tmp_path / "cache")
    (tmp_path / "cache" / "version").write_text("99999\n")
    with pytest.raises(CacheUnusable, match="later than"):
        CacheDir.check(tmp_path / "cache")
    cache.close()
