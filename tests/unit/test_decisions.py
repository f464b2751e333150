"""Lookups while Glance does not answer: nobody waits for what is known not to come, and no wait begins anew."""

from __future__ import annotations

import pytest
import trio
from image_fakes import ImageRig
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.identity import base_name
from lazyimg.errors import GlanceUnavailable, LookupUndecided
from lazyimg.image import decisions
from lazyimg.image.catalog import Catalog
from lazyimg.image.decisions import REST_S

DOWN = GlanceUnavailable("Glance is down")
LOOKUP_TIMEOUT_S = 2


def image_id(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012}"


async def undecided(catalog: Catalog, name: str) -> float:
    """Return how long a lookup took that must stay undecided."""
    began = trio.current_time()
    with pytest.raises(LookupUndecided):
        await catalog.lookup(name)
    return trio.current_time() - began


async def test_list_that_failed_failed_for_all_who_waited(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Twenty names that ask at once cost one list, also when it fails."""
    rig.glance.list_error = DOWN
    for number in range(20):
        nursery.start_soon(undecided, catalog, base_name(image_id(number)))
    await wait_all_tasks_blocked()
    assert rig.glance.list_calls == 1


async def test_lookups_held_up_behind_others_do_not_wait_again(
    rig: ImageRig, catalog: Catalog, autojump_clock: MockClock
) -> None:
    """[I6] Those the kernel sends when the shared limit has just run out are undecided at once; later ones wait."""
    rig.glance.image_gate = trio.Event()
    assert await undecided(catalog, image_id(1)) == pytest.approx(LOOKUP_TIMEOUT_S)
    assert await undecided(catalog, image_id(2)) == 0
    assert await undecided(catalog, image_id(1)) == 0
    await trio.sleep(REST_S)
    assert await undecided(catalog, image_id(2)) == pytest.approx(LOOKUP_TIMEOUT_S)
    # Once something is decided, who comes next may wait again.
    rig.glance.image_gate.set()
    await wait_all_tasks_blocked()
    rig.glance.image_gate = trio.Event()
    assert await undecided(catalog, image_id(3)) == pytest.approx(LOOKUP_TIMEOUT_S)


async def test_names_being_decided_are_bounded(
    rig: ImageRig, catalog: Catalog, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I5] While Glance says nothing, any number of names keeps a bounded number of questions."""
    monkeypatch.setattr(decisions, "RUNNING_MAX", 3)
    rig.glance.image_gate = trio.Event()
    for number in range(10):
        await undecided(catalog, image_id(number))
    await wait_all_tasks_blocked()
    assert len(rig.glance.image_calls) == 3
    rig.glance.image_gate.set()
    await wait_all_tasks_blocked()
    assert await catalog.lookup(image_id(9)) is None
