"""Inode numbers of the upper folder: found again by the next daemon, never given to another file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyimg.daemon.fdstore import FdStore, StoredFile, stored_file
from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.upper import Caller, Upper
from lazyimg.daemon.uppernodes import ROOT_INODE

ME = Caller(os.geteuid(), os.getegid())


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def new_handles() -> Handles:
    table = make_table()
    try:
        return Handles(table)
    finally:
        os.close(table)


def upper_of(root_fd: int) -> Upper:
    """Return the upper folder as a daemon that nothing was handed to has it."""
    return Upper(root_fd, new_handles(), FdStore())


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
    first = upper_of(root_fd)
    inode = looked_up(first, b"file", looked_up(first, b"folder"))
    (tmp_path / "folder" / "file").rename(tmp_path / "moved")
    following = upper_of(root_fd)
    assert following.files.read(inode, 0, 100) == b"content"
    assert following.files.write(inode, 7, b" more") == 5
    assert (tmp_path / "moved").read_bytes() == b"content more"


def test_number_is_never_given_again(root_fd: int, tmp_path: Path) -> None:
    """[I1] A deleted file's number is none of the files made later, though the disk uses its own again."""
    upper = upper_of(root_fd)
    told: set[int] = set()
    for _ in range(30):
        found, _ = upper.create(ROOT_INODE, b"file", 0o600, os.O_EXCL, ME)
        told.add(found.inode)
        upper.files.release(found.inode)
        upper.remove(ROOT_INODE, b"file")
        upper.forget([(found.inode, 1)])
    assert len(told) == 30
    with pytest.raises(OSError, match="gone") as caught:
        upper_of(root_fd).attributes(told.pop())
    assert caught.value.errno == errno.ESTALE


def test_descriptors_are_closed_with_the_last_lookup_and_handle(root_fd: int, tmp_path: Path) -> None:
    """[I5] What the kernel forgot and released leaves no descriptor behind."""
    upper = upper_of(root_fd)
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
    handles = new_handles()
    first = Upper(root_fd, handles, FdStore())
    inode = looked_up(first, b"file")
    first.files.open(inode, os.O_RDONLY, by_root=True)
    upper = Upper(root_fd, handles, FdStore())
    upper.files.read(inode, 0, 10)
    count = open_count()
    for _ in range(5):
        upper.files.read(inode, 0, 10)
    assert open_count() == count
    upper.files.release(inode)
    assert open_count() == count - 1


class Store(FdStore):
    """A descriptor store that outlives the daemon, as a holder's does."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, int] = {}

    def put(self, inode: int, fd: int, *, is_writing: bool) -> str:
        name = super().put(inode, fd, is_writing=is_writing)
        self.kept[name] = os.dup(fd)
        return name

    def remove(self, name: str) -> None:
        super().remove(name)
        os.close(self.kept.pop(name))

    def stored(self) -> list[StoredFile]:
        found = (stored_file(name, os.dup(fd)) for name, fd in self.kept.items())
        return [one for one in found if one is not None]


def test_next_daemon_takes_over_a_file_without_a_name(root_fd: int) -> None:
    """[I9] An unlinked file is read, written and looked at under the next daemon, until its last handle is released."""
    handles, store = new_handles(), Store()
    first = Upper(root_fd, handles, store)
    inode = first.create(ROOT_INODE, b"file", 0o600, os.O_RDWR, ME)[0].inode
    first.files.open(inode, os.O_RDONLY, by_root=True)
    first.files.write(inode, 0, b"content")
    first.remove(ROOT_INODE, b"file")
    upper = Upper(root_fd, handles, store)
    upper.files.take_over(store.stored())
    upper.files.release(inode)
    assert upper.files.read(inode, 0, 100) == b"content"
    assert upper.files.write(inode, 7, b" more") == 5
    assert upper.attributes(inode).attributes.st_size == 12
    upper.forget([(inode, 2)])
    assert upper.attributes(inode).attributes.st_nlink == 0, "as long as it is open"
    upper.files.release(inode)
    assert not store.kept
    with pytest.raises(OSError, match="gone"):
        upper.attributes(inode)


def test_stored_descriptor_that_nobody_has_open_is_given_up(root_fd: int) -> None:
    """What a daemon stored and did not come to answer, or had released, is not kept for ever."""
    handles, store = new_handles(), Store()
    first = Upper(root_fd, handles, store)
    inode = first.create(ROOT_INODE, b"file", 0o600, os.O_RDWR, ME)[0].inode
    handles.closed(inode)
    upper = Upper(root_fd, handles, store)
    upper.files.take_over(store.stored())
    assert not store.kept


def test_file_is_stored_once_for_each_way_of_access(root_fd: int, tmp_path: Path) -> None:
    """[I5] However often a file is opened, the store has at most two descriptors of it."""
    (tmp_path / "file").write_bytes(b"content")
    store = Store()
    upper = Upper(root_fd, new_handles(), store)
    inode = looked_up(upper, b"file")
    for _ in range(3):
        upper.files.open(inode, os.O_RDONLY, by_root=True)
        upper.files.open(inode, os.O_RDWR, by_root=True)
    found = store.stored()
    assert sorted(one.is_writing for one in found) == [False, True]
    assert {one.inode for one in found} == {inode}
    for _ in range(6):
        upper.files.release(inode)
    assert not store.kept
    for one in found:
        os.close(one.fd)


def test_file_somebody_else_just_made_is_looked_up_again(root_fd: int, tmp_path: Path) -> None:
    """A file the kernel has not judged is not opened by create: ESTALE sends it back, EEXIST where it must be new."""
    (tmp_path / "file").write_bytes(b"")
    upper = upper_of(root_fd)
    for flags, number in ((os.O_RDWR, errno.ESTALE), (os.O_RDWR | os.O_EXCL, errno.EEXIST)):
        with pytest.raises(OSError) as caught:  # noqa: PT011  (the number is looked at below)
            upper.create(ROOT_INODE, b"file", 0o600, flags, ME)
        assert caught.value.errno == number


def test_creating_leaves_thread_and_process_as_they_were(root_fd: int) -> None:
    """Ids and umask are as before after something was made for another user."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to make files for others")
    before = Path("/proc/thread-self/status").read_text()
    upper = upper_of(root_fd)
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
