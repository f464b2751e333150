"""Counts of open handles that outlive the daemon."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from lazyimg.daemon import handles
from lazyimg.daemon.handles import Handles, make_table


@pytest.fixture
def table() -> Iterator[int]:
    fd = make_table()
    yield fd
    os.close(fd)


def test_next_daemon_finds_the_counts(table: int) -> None:
    """[I9] Another process, or this one's next, has the count of each inode, large numbers too."""
    first = Handles(table)
    for inode in (5, 1 << 63 | 7, 5, 9):
        first.opened(inode)
    assert first.closed(9) == 0
    assert Handles(table).all() == first.all() == {5: 2, 1 << 63 | 7: 1}
    following = Handles(table)
    assert following.closed(5) == 1
    following.opened(11)
    assert Handles(table).all() == {5: 1, 1 << 63 | 7: 1, 11: 1}
    assert following.count(5) == 1
    assert following.count(9) == 0


def test_release_of_what_was_never_counted_is_harmless(table: int) -> None:
    """[I9] A release that the kernel sends once more counts nothing below nothing."""
    counts = Handles(table)
    counts.opened(5)
    assert [counts.closed(5), counts.closed(5), counts.closed(6)] == [0, 0, 0]
    assert counts.all() == Handles(table).all() == {}


def test_full_table_refuses_to_open(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5] More different open files than there are slots are refused with ENFILE; a released slot is used again."""
    monkeypatch.setattr(handles, "TABLE_BYTES", 3 * 16)
    counts = Handles(table)
    for inode in (1, 2, 3, 3):
        counts.opened(inode)
    with pytest.raises(OSError, match="too many") as caught:
        counts.opened(4)
    assert caught.value.errno == errno.ENFILE
    counts.closed(2)
    counts.opened(4)
    assert Handles(table).all() == {1: 1, 3: 2, 4: 1}
