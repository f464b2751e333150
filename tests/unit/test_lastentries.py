"""What one daemon knows of the images is found by the next, whenever the first was killed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from store_images import image_entry

from lazyimg.daemon import lastentries
from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.lastentries import LastEntries

ENTRIES = [image_entry(number, 4096 * number) for number in (1, 2, 3)]


@pytest.fixture
def table() -> Iterator[int]:
    fd = make_table()
    yield fd
    os.close(fd)


def test_first_daemon_of_a_mount_finds_none(table: int) -> None:
    """None is not the same as no image."""
    assert LastEntries(table).found is None
    LastEntries(table).keep([])
    assert LastEntries(table).found == []


def test_next_daemon_finds_the_last_state(table: int) -> None:
    """[I9] Each change replaces what was kept; the counts of handles in the same file are as they were."""
    Handles(table).opened(7)
    first = LastEntries(table)
    first.keep(ENTRIES)
    changed = [replace(ENTRIES[0], state="quarantined", reason="two\nlines"), *ENTRIES[1:]]
    first.keep(changed)
    assert LastEntries(table).found == changed
    second = LastEntries(table)
    second.keep(ENTRIES[:1])
    assert LastEntries(table).found == ENTRIES[:1]
    assert Handles(table).all() == {7: 1}


def test_killed_writer_leaves_the_state_before(table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I9] Wherever a write ends, one state or the other is found, whole."""
    LastEntries(table).keep(ENTRIES[:1])
    LastEntries(table).keep(ENTRIES[:2])
    whole = os.pwrite
    torn = 0

    def write_in_part(fd: int, data: bytes, offset: int) -> int:
        return whole(fd, data[:torn], offset)

    sizes: list[int] = []

    def measured(fd: int, data: bytes, offset: int) -> int:
        sizes.append(len(data))
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", measured)
        LastEntries(table).keep(ENTRIES)
    for torn in range(sizes[0]):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", write_in_part)
            LastEntries(table).keep(ENTRIES)
        assert LastEntries(table).found == ENTRIES[:2], torn
    LastEntries(table).keep(ENTRIES)
    assert LastEntries(table).found == ENTRIES


def test_line_of_another_version_costs_only_its_image(
    table: int, expected_warnings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not understood is left out and said."""
    expected_warnings("not understood: unknown version")
    monkeypatch.setattr("lazyimg.store.entry.ENTRY_VERSION", 99)
    LastEntries(table).keep(ENTRIES[:1])
    monkeypatch.undo()
    assert LastEntries(table).found == []


def test_memory_that_cannot_be_had_is_said(
    table: int, expected_warnings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change itself goes on; the state before is what the next daemon finds."""
    expected_warnings("would not know the images")
    last = LastEntries(table)
    last.keep(ENTRIES)

    def fail(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        last.keep([])
    assert LastEntries(table).found == ENTRIES
    last.keep([])
    assert LastEntries(table).found == []


def test_slots_are_apart() -> None:
    """Neither slot lies over the counts of handles or the other slot."""
    first, second = lastentries._SLOTS
    assert first >= lastentries.TABLE_BYTES
    assert second - first >= 1 << 32
