"""However many names are undecided while Glance says nothing, the folder is not held longer than one limit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from real_mount import Mount, lookup, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

LOOKUP_TIMEOUT_S = 2
# What the machine may take beside the limit, from the first question to the last answer.
SLACK_S = 1.0
STALL_S = 600


@contextmanager
def within(limit_s: float, what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    took_s = time.monotonic() - began
    assert took_s < limit_s, f"{what} took {took_s:.1f} s"


@pytest.fixture
def glance_apart(make_glance: Callable[..., ServedGlance]) -> ServedGlance:
    return make_glance()


def test_twenty_undecided_names_a_create_and_a_listing_share_one_limit(
    make_mount: Callable[..., Mount], glance_apart: ServedGlance
) -> None:
    """[I6] While Glance says nothing, all who ask at once are answered within one limit, makers and listers too."""
    glance = glance_apart
    known, unknown = glance.add(MIB), glance.add(MIB)
    mount = make_mount(glance, lookup_timeout=LOOKUP_TIMEOUT_S)
    assert mount.path_of(known).read_bytes() == known.content
    glance.fail(FaultRule("delay", kind="any", seconds=STALL_S))
    names = [mount.path_of(unknown), *(mount.path / f"{number:040x}" for number in range(19))]
    with ThreadPoolExecutor(30) as pool, within(LOOKUP_TIMEOUT_S + SLACK_S, "all of them"):
        asked = [pool.submit(lookup, path) for path in names[:10]]
        # The create has the folder to itself, so it waits for those, and the others wait for it.
        time.sleep(0.2)
        made = pool.submit((mount.path / "made.part").write_bytes, b"made")
        listed = pool.submit(os.listdir, mount.path)
        asked += [pool.submit(lookup, path) for path in names[10:]]
        again = pool.submit(lookup, mount.path_of(known))
        assert [one.result() for one in asked] == ["EAGAIN"] * 20
        assert made.result() == 4
        assert known.base_name in listed.result()
        assert again.result() == "found"
    glance.stop()
    glance.start()
    wait_until(
        lambda: lookup(mount.path_of(unknown)) == "found", "the name, which the kernel did not keep", 30
    )
    assert [lookup(path) for path in names[1:]] == ["ENOENT"] * 19


def test_glance_that_is_known_to_be_down_is_not_waited_for(
    make_mount: Callable[..., Mount], glance_apart: ServedGlance
) -> None:
    """[I6] With Glance gone, and known to be, twenty names take no time one after the other; then they are found."""
    glance = glance_apart
    images = [glance.add(1000) for _ in range(3)]
    mount = make_mount(glance, lookup_timeout=LOOKUP_TIMEOUT_S)
    glance.stop()
    for number in range(3):
        assert lookup(mount.path / f"{number:040x}") == "EAGAIN"
    with within(LOOKUP_TIMEOUT_S, "sixty lookups in turn"):
        assert {lookup(mount.path_of(image)) for image in images * 20} == {"EAGAIN"}
    glance.start()
    for image in images:
        wait_until(lambda image=image: lookup(mount.path_of(image)) == "found", "the name", 30)
