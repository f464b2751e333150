"""What is open becomes whole by itself, and a guest on it no longer depends on Glance."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from real_mount import Mount, is_running, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage, pattern

MakeMount = Callable[..., Mount]


@pytest.fixture
def hydrating(make_mount: MakeMount, glance: ServedGlance) -> Mount:
    return make_mount(glance, hydrate=True, hydrate_delay=0.3)


def is_whole(mount: Mount, image: ServedImage) -> bool:
    return str(mount.status_of(image)["state"]) == "whole"


def test_open_image_outlives_glance(make_mount: MakeMount, make_glance: Callable[..., ServedGlance]) -> None:
    """An open image is at risk until all of it is here; then Glance may go, and every byte can be read."""
    glance = make_glance()
    image = glance.add(3 * MIB)
    mount = make_mount(glance, hydrate=True, hydrate_delay=1)
    with mount.path_of(image).open("rb", buffering=0) as guest:
        assert guest.read(4096) == image.content[:4096]
        shown = mount.status_of(image)
        assert (shown["at_risk"], shown["missing_bytes"] > 0, shown["state"]) == (True, True, "lazy")
        wait_until(lambda: is_whole(mount, image), "the rest of the image")
        shown = mount.status_of(image)
        assert (shown["at_risk"], shown["missing_bytes"]) == (False, 0)
        glance.stop()
        assert read_direct(mount.path_of(image), 0, 3 * MIB) == image.content


def test_image_nobody_holds_stays_as_it_is(hydrating: Mount, glance: ServedGlance) -> None:
    """Closing an image ends its hydration, and its own property keeps it from beginning; neither is whole."""
    closed, held = glance.add(3 * MIB), glance.add(3 * MIB)
    forbidden = glance.add(3 * MIB, lazyimg_hydrate="false")
    with hydrating.path_of(closed).open("rb", buffering=0) as short:
        assert short.read(10) == closed.content[:10]
    with (
        hydrating.path_of(forbidden).open("rb", buffering=0) as one,
        hydrating.path_of(held).open("rb", buffering=0) as other,
    ):
        assert (one.read(10), other.read(10)) == (forbidden.content[:10], held.content[:10])
        wait_until(lambda: is_whole(hydrating, held), "the image that is held")
        assert not is_whole(hydrating, closed)
        assert not is_whole(hydrating, forbidden)


def test_next_daemon_goes_on(hydrating: Mount, glance: ServedGlance) -> None:
    """A daemon that takes over makes whole what guests of the last one hold open."""
    image = glance.add(3 * MIB)
    with hydrating.path_of(image).open("rb", buffering=0) as guest:
        assert guest.read(10) == image.content[:10]
        pid = hydrating.kill_daemon()
        wait_until(lambda: not is_running(pid), "the end of the daemon")
        wait_until(
            lambda: hydrating.is_ready() and is_whole(hydrating, image), "the image, by the next daemon"
        )
        assert hydrating.status_of(image)["at_risk"] is False
        assert guest.read(10) == image.content[10:20]


def test_qcow2_becomes_whole_and_is_compared_with_its_source(
    hydrating: Mount, glance: ServedGlance, require: Callable[..., None], tmp_path: Path
) -> None:
    """A compressed qcow2 in the raw view is hydrated, and found to be what its source's hash proves."""
    require("qemu-img")
    raw, packed = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    content = pattern(5, MIB) + bytes(MIB) + pattern(6, 2 * MIB)
    raw.write_bytes(content)
    command = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(packed)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    image = glance.add(packed.read_bytes(), "qcow2")
    with hydrating.path_of(image).open("rb", buffering=0) as guest:
        assert guest.read(4096) == content[:4096]
        wait_until(lambda: is_whole(hydrating, image), "the rest of the image")
        wait_until(lambda: hydrating.status_of(image)["source_hash"] == "match", "the comparison")
        assert read_direct(hydrating.path_of(image), 0, 4 * MIB) == content
