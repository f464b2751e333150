"""Presence in memory: what may count as proven, and what a page read from the index may miss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from store_images import image_entry

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.store.index import Index
from lazyimg.store.presence import ABSENT, PROVEN, UNPROVEN, PageLimit, Presence

ENTRY = image_entry(1, 100 * CHUNK)
FIRST = range(3)


class InterruptedIndex(Index):
    """An index where something happens right after its next page was read."""

    happening: Callable[[], object] | None = None

    def page(self, key: str, generation: str, page_no: int) -> tuple[int, ...]:
        page = super().page(key, generation, page_no)
        happening, self.happening = self.happening, None
        if happening is not None:
            happening()
        return page


@pytest.fixture
def index(tmp_path: Path) -> InterruptedIndex:
    index = InterruptedIndex(tmp_path)
    index.put(ENTRY)
    return index


@pytest.fixture
def presence(index: InterruptedIndex) -> Presence:
    return Presence(index, index.begin(ENTRY.key, "0" * 16), PageLimit())


def test_chunk_is_proven_by_a_check_or_by_its_commit(presence: Presence) -> None:
    """Written is unproven, committed is proven, and loaded from the index is unproven until checked."""
    assert presence.states(FIRST) == bytes(3)
    presence.set_written({0: 7, 1: 8})
    presence.set_proven([0, 1, 2])
    assert presence.states(FIRST) == bytes([UNPROVEN, UNPROVEN, ABSENT])
    presence.commit({0: 7})
    assert presence.states(FIRST) == bytes([PROVEN, UNPROVEN, ABSENT])
    presence.unload(FIRST)
    assert presence.states_nowait(FIRST) is None
    assert presence.states(FIRST) == bytes([UNPROVEN, UNPROVEN, ABSENT])
    presence.set_proven([0])
    assert presence.states(FIRST) == bytes([PROVEN, UNPROVEN, ABSENT])


def test_check_that_ends_after_a_drop_proves_nothing(presence: Presence) -> None:
    """A chunk that was dropped while its bytes were checked stays absent."""
    presence.set_written({0: 7})
    presence.commit({0: 7})
    presence.unload(FIRST)
    presence.states(FIRST)
    presence.forget([0])
    presence.set_proven([0])
    assert presence.states(FIRST) == bytes(3)


def test_sums_are_those_written_before_those_of_the_index(presence: Presence) -> None:
    """The checksum to hold a chunk to is known at every stage, 0 where there is none."""
    presence.set_written({0: 7, 2: 9})
    presence.commit({0: 7})
    assert presence.sums(FIRST) == [7, 0, 9]
    assert presence.sums(range(2, 3)) == [9]
    assert (presence.written_sum_nowait(0), presence.written_sum_nowait(2)) == (None, 9)


@pytest.mark.parametrize("name", ["commit", "forget", "set_written", "fail"])
def test_page_read_before_a_change_is_read_again(
    index: InterruptedIndex, presence: Presence, name: str
) -> None:
    """What changes while a page is being read from the index is in the page all the same."""
    presence.set_written({0: 7, 1: 8})
    presence.commit({0: 7})
    happenings: dict[str, tuple[Callable[[], object], list[int]]] = {
        "commit": (lambda: presence.commit({1: 8}), [UNPROVEN, UNPROVEN, ABSENT]),
        "forget": (lambda: presence.forget([0]), [ABSENT, UNPROVEN, ABSENT]),
        "set_written": (lambda: presence.set_written({2: 9}), [UNPROVEN, UNPROVEN, UNPROVEN]),
        "fail": (lambda: presence.fail({1: 8}), [UNPROVEN, ABSENT, ABSENT]),
    }
    index.happening, expected = happenings[name]
    assert presence.states(FIRST) == bytes(expected)
    assert presence.states_nowait(FIRST) == bytes(expected)


def test_failed_sync_spares_what_was_written_since(presence: Presence) -> None:
    """Only the chunks of the failed sync are lost."""
    written = {0: 7, 1: 8}
    presence.set_written(written)
    presence.set_written({2: 9})
    presence.fail(written)
    assert presence.states(FIRST) == bytes([ABSENT, ABSENT, UNPROVEN])
    assert presence.written() == {2: 9}


def test_chunk_forgotten_during_the_sync_is_not_committed(presence: Presence) -> None:
    """A commit of chunks that were dropped after they were written makes nothing durable."""
    presence.set_written({0: 7, 1: 8})
    written = presence.written()
    presence.forget([0])
    presence.commit(written)
    presence.unload(FIRST)
    assert presence.states(FIRST) == bytes([ABSENT, UNPROVEN, ABSENT])
    assert presence.present_count == 1


def test_closed_presence_gives_its_pages_back(index: InterruptedIndex) -> None:
    """The limit counts no page of a closed file."""
    limit = PageLimit(5)
    presence = Presence(index, index.begin(ENTRY.key, "0" * 16), limit)
    presence.states(FIRST)
    assert len(limit) == 1
    presence.close()
    assert len(limit) == 0
    assert presence.states_nowait(FIRST) is None
