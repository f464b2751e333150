"""Handles that only write go past the kernel's page cache: nobody sees that, neither in bytes nor in modes."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acting_user import NOBODY, run_as
from real_mount import Mount, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(mounted: Mount, tmp_path: Path) -> Path:
    """A folder of the test's own in the mount."""
    path = mounted.path / tmp_path.name
    path.mkdir()
    return path


@pytest.fixture
def of_nobody(folder: Path) -> Path:
    """A folder of user 65534's own in the mount."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to act as others")
    os.chown(folder, NOBODY, NOBODY)
    return folder


@pytest.fixture
def written(folder: Path) -> Iterator[tuple[Path, int]]:
    """A file of 2 MiB in the page cache of a handle that stays open, and one that only writes."""
    path = folder / "file"
    path.write_bytes(b"a" * 2 * MIB)
    writer = os.open(path, os.O_WRONLY)
    yield path, writer
    os.close(writer)


def test_other_handles_read_what_was_written(written: tuple[Path, int]) -> None:
    """[I1] What one handle wrote is what others read, and see mapped, though they had the old bytes cached."""
    path, writer = written
    with path.open("rb", buffering=0) as reader, mmap.mmap(reader.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert reader.read(2 * MIB) == mapped[:] == b"a" * 2 * MIB
        # Unaligned, and across the pages' ends.
        assert os.pwrite(writer, b"b" * 10_001, 4095) == 10_001
        expected = b"a" * 4095 + b"b" * 10_001 + b"a" * (2 * MIB - 14_096)
        assert os.pread(reader.fileno(), 2 * MIB, 0) == expected
        assert mapped[:] == expected
        assert os.pwrite(writer, b"c" * 3 * MIB, MIB) == 3 * MIB, "more than one request, and past the end"
        assert os.fstat(reader.fileno()).st_size == 4 * MIB
        assert os.pread(reader.fileno(), 4 * MIB, 0) == expected[:MIB] + b"c" * 3 * MIB


def test_what_was_written_through_a_mapping_stays(written: tuple[Path, int]) -> None:
    """[I1] Bytes that another handle wrote into its mapping and nobody flushed are kept beside those written."""
    path, writer = written
    with path.open("r+b", buffering=0) as other, mmap.mmap(other.fileno(), 0) as mapped:
        mapped[10:20] = b"m" * 10
        os.pwrite(writer, b"w" * 10, 20)
        assert mapped[:40] == b"a" * 10 + b"m" * 10 + b"w" * 10 + b"a" * 10
        mapped.flush()
    assert path.read_bytes()[:40] == b"a" * 10 + b"m" * 10 + b"w" * 10 + b"a" * 10


def test_appends_of_two_handles_follow_one_another(folder: Path) -> None:
    """Handles opened to append write at the end as it then is, whoever moved it."""
    path = folder / "log"
    with path.open("ab", buffering=0) as one, path.open("ab", buffering=0) as other:
        for number in range(20):
            one.write(b"one %d\n" % number)
            other.write(b"other %d\n" % number)
    lines = [b"%s %d\n" % (name, number) for number in range(20) for name in (b"one", b"other")]
    assert path.read_bytes() == b"".join(lines)


def test_set_ids_that_come_while_it_is_open_go_with_the_next_write(of_nobody: Path) -> None:
    """A file made to run as its owner while somebody has it open for writing does not stay so when he writes."""
    program = """
fd = os.open("file", os.O_WRONLY | os.O_CREAT, 0o700)
os.write(fd, b"x")
os.chmod("file", 0o6777)
before = owned("file")[2]
os.write(fd, b"y")
result = [before, owned("file")[2]]
"""
    assert run_as(of_nobody, program) == ["0o6777", "0o777"]


@pytest.mark.parametrize("mode", [0o4700, 0o2700, 0o700])
def test_set_ids_asked_for_at_creation(of_nobody: Path, mode: int) -> None:
    """A file made with set-user-ID or set-group-ID has it, and loses it with the first write."""
    program = f"""
fd = os.open("file", os.O_WRONLY | os.O_CREAT, {mode})
before = owned("file")[2]
os.write(fd, b"x")
result = [before, owned("file")[2]]
"""
    group_bits_stay = stat.S_ISGID if mode & stat.S_ISGID and not mode & stat.S_IXGRP else 0
    assert run_as(of_nobody, program, umask=0) == [oct(mode), oct(0o700 | group_bits_stay)]


def test_writing_goes_on_after_a_kill(
    make_mount: Callable[..., Mount], glance: ServedGlance, tmp_path: Path
) -> None:
    """[I9] A handle that only writes goes on under the next daemon, which takes set-IDs away too."""
    mount = make_mount(glance)
    path = mount.path / "file"
    with path.open("wb", buffering=0) as file:
        file.write(b"before ")
        mount.kill_daemon()
        path.chmod(0o4755)
        file.write(b"after")
        wait_until(lambda: not path.stat().st_mode & stat.S_ISUID, "the mode without set-user-ID", 10)
    assert path.read_bytes() == b"before after"


def test_programs_are_told_to_write_much_at_once(folder: Path) -> None:
    """Files of Python, which writes as much at once as it is told to, go by few requests."""
    path = folder / "file"
    path.write_bytes(b"x")
    assert path.stat().st_blksize == MIB
    with path.open("wb") as file:
        for _ in range(15):
            file.write(b"x" * 65536)
        assert os.fstat(file.fileno()).st_size == 0, "nothing is written before a MiB is full"
