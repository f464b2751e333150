"""A mount whose cache lies on a disk that fails on request, and an image wholly in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from faulty_disk import FaultyDisk
from real_mount import Mount, read_direct
from served_glance import MIB, ServedGlance, ServedImage

DISK_TIMEOUT_S = 2.0
IMAGE_BYTES = 4 * MIB


@pytest.fixture
def read_timeout_s() -> int:
    """How long reads on the mount wait; a module may have its own."""
    return 20


@pytest.fixture
def mount(
    faulty_disk: FaultyDisk, make_mount: Callable[..., Mount], glance: ServedGlance, read_timeout_s: int
) -> Iterator[Mount]:
    mount = make_mount(
        glance,
        cache_dir=faulty_disk.path / "cache",
        disk_timeout=DISK_TIMEOUT_S,
        read_timeout=read_timeout_s,
    )
    yield mount
    # Before the mount is ended: a daemon with a hanging thread in it does not.
    faulty_disk.heal()


@pytest.fixture
def whole(mount: Mount, glance: ServedGlance) -> ServedImage:
    """An image that is wholly in the cache."""
    image = glance.add(IMAGE_BYTES)
    mount.fetch_all(image)
    return image


def check(mount: Mount, image: ServedImage, *megabytes: int) -> None:
    """Read these parts of an image past the kernel's page cache."""
    for at in megabytes:
        start = at * MIB
        assert read_direct(mount.path_of(image), start, MIB) == image.content[start : start + MIB]
