"""The upper folder's open files: when the kernel is told to write out what was written, and nothing is harmed by it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyimg.daemon import linux, upperfiles
from lazyimg.daemon.fdstore import FdStore
from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.upper import Upper
from lazyimg.daemon.upperfiles import WRITE_OUT_BYTES
from lazyimg.daemon.uppernodes import ROOT_INODE

STEP = WRITE_OUT_BYTES // 4
Runs = list[tuple[int, int]]


@pytest.fixture
def upper(tmp_path: Path) -> Iterator[Upper]:
    fd, table = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY), make_table()
    yield Upper(fd, Handles(table), FdStore())
    os.close(table)
    os.close(fd)


@pytest.fixture
def inode(upper: Upper, tmp_path: Path) -> int:
    """A file of the upper folder, open for writing."""
    (tmp_path / "file").write_bytes(b"")
    found = upper.lookup(ROOT_INODE, b"file")
    assert found is not None
    upper.files.open(found.inode, os.O_WRONLY, by_root=True)
    return found.inode


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The ranges that the kernel was told to write out."""
    told: Runs = []

    def begin(fd: int, start: int, stop: int) -> None:
        told.append((start, stop))
        begin_writing_out(fd, start, stop)

    begin_writing_out = linux.begin_writing_out
    monkeypatch.setattr(linux, "begin_writing_out", begin)
    return told


def test_long_runs_are_written_out(upper: Upper, inode: int, runs: Runs, tmp_path: Path) -> None:
    """What is written from end to end is written out in runs, each byte of them once, while it is written."""
    for start in range(0, 10 * STEP, STEP):
        upper.files.write(inode, start, b"x" * STEP)
    assert runs == [(0, 4 * STEP), (4 * STEP, 8 * STEP)]
    assert (tmp_path / "file").read_bytes() == b"x" * 10 * STEP


def test_scattered_writes_are_left_to_the_kernel(upper: Upper, inode: int, runs: Runs) -> None:
    """Writes here and there are not hurried to disk, where they may yet be written over."""
    for start in (0, 8 * STEP, STEP, 9 * STEP, 2 * STEP, 0, STEP, 2 * STEP):
        upper.files.write(inode, start, b"x" * STEP)
    assert runs == []
    upper.files.write(inode, 3 * STEP, b"x" * STEP)
    assert runs == [(0, 4 * STEP)], "the last four were one run"


def test_disk_that_cannot_write_out_fails_no_write(
    upper: Upper, inode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the hint is not an error of the write, which fsync is there to tell."""

    def begin(fd: int, start: int, stop: int) -> None:
        raise OSError(5, "broken")

    monkeypatch.setattr(linux, "begin_writing_out", begin)
    assert upper.files.write(inode, 0, b"x" * WRITE_OUT_BYTES) == WRITE_OUT_BYTES


@pytest.mark.parametrize("is_coherent", [False, True])
def test_direct_handles_need_a_kernel_that_keeps_its_cache_right(
    upper: Upper, inode: int, monkeypatch: pytest.MonkeyPatch, is_coherent: bool
) -> None:
    """[I1] Before Linux 6.6 other handles would read old bytes, so no handle is direct; nor is one that reads, ever."""
    monkeypatch.setattr(upperfiles, "IS_DIRECT_COHERENT", is_coherent)
    assert upper.files.open(inode, os.O_WRONLY, by_root=True) == is_coherent
    assert not upper.files.open(inode, os.O_RDWR, by_root=True)
    assert not upper.files.open(inode, os.O_RDONLY, by_root=True)
