"""Inode numbers of the upper folder: found again by the next daemon, never given to another file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyimg.daemon.upper import Caller, Upper
from lazyimg.daemon.uppernodes import ROOT_INODE

ME = Caller(os.geteuid(), os.getegid())


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def looked_up(upper: Upper, name: bytes, parent: int = ROOT_INODE) -> int:
    found = upper.lookup(parent, name)
    assert found is not None
    return found.inode


def open_count() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_next_daemon_finds_the_same_file_under_its_number(root_fd: int, tmp_path: Path) -> None:
    """[I9] A number told by one daemon means the same file to the next, renamed and deep down as it may be."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"content")
    first = Upper(root_fd)
    inode = looked_up(first, b"file", looked_up(first, b"folder"))
    (tmp_path / "folder" / "file").rename(tmp_path / "moved")
    following = Upper(root_fd)
    assert following.files.read(inode, 0, 100) == b"content"
    assert following.files.write(inode, 7, b" more") == 5
    assert (tmp_path / "moved").read_bytes() == b"content more"


def test_number_is_never_given_again(root_fd: int, tmp_path: Path) -> None:
    """[I1] A deleted file's number is none of the files made later, though the disk uses its own again."""
    upper = Upper(root_fd)
    told: set[int] = set()
    for _ in range(30):
        found, _ = upper.create(ROOT_INODE, b"file", 0o600, os.O_EXCL, ME)
        told.add(found.inode)
        upper.files.release(found.inode)
        upper.remove(ROOT_INODE, b"file")
        upper.forget([(found.inode, 1)])
    assert len(told) == 30
    with pytest.raises(OSError, match="gone") as caught:
        Upper(root_fd).attributes(told.pop())
    assert caught.value.errno == errno.ESTALE


def test_descriptors_are_closed_with_the_last_lookup_and_handle(root_fd: int, tmp_path: Path) -> None:
    """[I5] What the kernel forgot and released leaves no descriptor behind."""
    upper = Upper(root_fd)
    before = open_count()
    found, _ = upper.create(ROOT_INODE, b"file", 0o600, os.O_EXCL, ME)
    assert looked_up(upper, b"file") == found.inode
    upper.files.open(found.inode, os.O_RDONLY, by_root=True)
    upper.files.read(found.inode, 0, 10)
    upper.files.release(found.inode)
    upper.files.write(found.inode, 0, b"x")
    upper.files.release(found.inode)
    upper.forget([(found.inode, 1)])
    assert open_count() == before + 1, "one lookup is left"
    upper.forget([(found.inode, 1)])
    assert open_count() == before


def test_handle_of_an_earlier_daemon_is_opened_once(root_fd: int, tmp_path: Path) -> None:
    """Uses of a handle this daemon did not open share one descriptor until it is released."""
    (tmp_path / "file").write_bytes(b"content")
    inode = looked_up(Upper(root_fd), b"file")
    upper = Upper(root_fd)
    upper.files.read(inode, 0, 10)
    count = open_count()
    for _ in range(5):
        upper.files.read(inode, 0, 10)
    assert open_count() == count
    upper.files.release(inode)
    assert open_count() == count - 1


def test_file_somebody_else_just_made_is_looked_up_again(root_fd: int, tmp_path: Path) -> None:
    """A file the kernel has not judged is not opened by create: ESTALE sends it back, EEXIST where it must be new."""
    (tmp_path / "file").write_bytes(b"")
    upper = Upper(root_fd)
    for flags, number in ((os.O_RDWR, errno.ESTALE), (os.O_RDWR | os.O_EXCL, errno.EEXIST)):
        with pytest.raises(OSError) as caught:  # noqa: PT011  (the number is looked at below)
            upper.create(ROOT_INODE, b"file", 0o600, flags, ME)
        assert caught.value.errno == number


def test_creating_leaves_thread_and_process_as_they_were(root_fd: int) -> None:
    """Ids and umask are as before after something was made for another user."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to make files for others")
    before = Path("/proc/thread-self/status").read_text()
    upper = Upper(root_fd)
    found, _ = upper.create(ROOT_INODE, b"file", 0o666, os.O_EXCL, Caller(12, 34))
    upper.files.release(found.inode)
    assert (found.attributes.st_uid, found.attributes.st_gid) == (12, 34)
    assert found.attributes.st_mode & 0o777 == 0o666
    after = Path("/proc/thread-self/status").read_text()
    for name in ("Umask", "Uid", "Gid", "CapEff", "CapPrm"):
        lines = [
            next(line for line in text.splitlines() if line.startswith(name)) for text in (before, after)
        ]
        assert lines[0] == lines[1]
