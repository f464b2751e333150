"""What is done for no guest, under a real mount, while the cache's disk hangs or fails.

disk hangs     hydration asks Glance for nothing; `lazyimg verify` says so within disk_timeout, exit code 9
disk normal    hydration goes on by itself; verify does its work
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

import pytest
from faulty_disk import CHANGES, SYNCS, FaultyDisk
from real_mount import Mount, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow

TIMEOUT_S = 2.0
# What a busy machine may add.
GRACE_S = 10.0
IMAGE_BYTES = 32 * MIB


@pytest.fixture
def make(
    faulty_disk: FaultyDisk, make_mount: Callable[..., Mount], glance: ServedGlance
) -> Callable[..., Mount]:
    def make(**config: object) -> Mount:
        return make_mount(
            glance, cache_dir=faulty_disk.path / "cache", disk_timeout=TIMEOUT_S, read_timeout=20, **config
        )

    return make


def state(mount: Mount) -> str:
    return str(mount.status()["disk_state"])


def test_verify_of_a_disk_that_hangs_says_so(
    faulty_disk: FaultyDisk, make: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I5] It ends within `disk_timeout`, with one line and exit code 9, and again does its work afterwards."""
    mount = make()
    image = glance.add(IMAGE_BYTES)
    mount.fetch_all(image)
    try:
        faulty_disk.strike("read", path="cache/chunks/*", hang=True)
        for _ in range(2):
            began_s = time.monotonic()
            result = lazyimg("verify", image.id, "--control", mount.control)
            assert time.monotonic() - began_s < TIMEOUT_S + GRACE_S
            assert result.returncode == 9, result.stderr
            assert "its state is bypass" in " ".join(result.stderr.split())
    finally:
        faulty_disk.heal()
    wait_until(lambda: state(mount) == "normal", "the disk's good end", 30)
    assert lazyimg("verify", image.id, "--control", mount.control).returncode == 0
    assert mount.log().count("cache disk") <= 6


def test_nothing_is_hydrated_onto_a_disk_that_fails(
    faulty_disk: FaultyDisk, make: Callable[..., Mount], glance: ServedGlance
) -> None:
    """An open image is left alone while its disk is not normal, and becomes whole when it is."""
    mount = make(hydrate=True, hydrate_delay=0, hydrate_rate=2 * MIB)
    image = glance.add(IMAGE_BYTES)
    path = mount.path_of(image)
    with path.open("rb"):
        assert read_direct(path, 0, MIB) == image.content[:MIB]
        try:
            faulty_disk.strike(*CHANGES, *SYNCS, error=errno.EIO)
            wait_until(lambda: state(mount) == "bypass", "the end of the disk's use", 30)
            before = len(glance.data_requests(image))
            # Steps at this rate begin once a second.
            time.sleep(3)
            assert len(glance.data_requests(image)) == before
        finally:
            faulty_disk.heal()
        wait_until(lambda: state(mount) == "normal", "the disk's good end", 30)
        wait_until(lambda: mount.status_of(image)["state"] == "whole", "the rest of the image", 60)
