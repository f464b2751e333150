"""Entries are changed one at a time, and what was dropped meanwhile stays dropped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import trio
from store_images import image_entry
from trio.testing import wait_all_tasks_blocked

from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.states import States
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index


class Stored:
    """Stands for the index, and for its disk, whose writes wait for `go`."""

    may_write = True

    def __init__(self) -> None:
        # What the next daemon would find, after each change.
        self.kept: list[list[ImageEntry]] = []
        self.by_key: dict[str, ImageEntry] = {}
        self.go = trio.Event()
        self.go.set()

    def get(self, key: str) -> ImageEntry | None:
        return self.by_key.get(key)

    def entries(self) -> list[ImageEntry]:
        return list(self.by_key.values())

    def keep(self, entries: list[ImageEntry]) -> None:
        self.kept.append(entries)

    def put(self, entry: ImageEntry) -> None:
        self.by_key[entry.key] = entry

    async def write(
        self, function: Callable[..., None], *args: object, limiter: trio.CapacityLimiter
    ) -> None:
        await self.go.wait()
        async with limiter:
            function(*args)


@pytest.fixture
def stored() -> Stored:
    return Stored()


@pytest.fixture
def states(stored: Stored) -> States:
    return States(cast(Index, stored), cast(DiskHealth, stored), trio.CapacityLimiter(1), stored.keep)


@pytest.fixture
def entry() -> ImageEntry:
    return image_entry(1, 4096)


async def test_dropped_image_is_not_brought_back(states: States, stored: Stored, entry: ImageEntry) -> None:
    """[I7] A use that is noted after the image was dropped makes no entry of it."""
    await states.add(entry)
    del stored.by_key[entry.key]
    await states.used(entry)
    await states.save()
    assert not stored.by_key


async def test_next_daemon_is_told_before_the_disk(
    states: States, stored: Stored, entry: ImageEntry, nursery: trio.Nursery
) -> None:
    """[I9] What a hanging disk has not noted is kept for the next daemon at once; a new image when it is stored."""
    stored.go = trio.Event()
    nursery.start_soon(states.add, entry)
    await wait_all_tasks_blocked()
    assert stored.kept == []
    stored.go.set()
    await wait_all_tasks_blocked()
    assert stored.kept == [[entry]]
    stored.go = trio.Event()
    nursery.start_soon(lambda: states.mark(entry, state="quarantined", reason="damaged"))
    await wait_all_tasks_blocked()
    assert stored.by_key == {entry.key: entry}
    assert stored.kept[-1] == [replace(entry, state="quarantined", reason="damaged")]
    stored.go.set()


async def test_image_found_again_while_the_last_one_is_noted(
    states: States, stored: Stored, entry: ImageEntry, nursery: trio.Nursery
) -> None:
    """[I1] What is being noted of a dropped image is stored before the new entry of its name, never after."""
    await states.add(entry)
    stored.go = trio.Event()
    nursery.start_soon(states.used, entry)
    await wait_all_tasks_blocked()
    found_again = replace(entry, last_used_s=2.0)
    nursery.start_soon(states.add, found_again)
    await wait_all_tasks_blocked()
    stored.go.set()
    await wait_all_tasks_blocked()
    assert stored.by_key == {entry.key: found_again}
    assert states.get(entry.key) == found_again
