"""More images than a process may have files open: guests read them all."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable

import pytest
from real_mount import Mount, read_direct, wait_until
from served_glance import ServedGlance

pytestmark = pytest.mark.slow

IMAGES = 300
DESCRIPTORS_MAX = 160
CHUNK = 1 << 16


def test_open_images_outnumber_the_descriptors(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I5] 300 images are held open and read, twice, by a daemon that may have half as many descriptors."""
    mount = make_mount(glance, open_files_max=64)
    pid = mount.status()["daemon_pid"]
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (DESCRIPTORS_MAX, DESCRIPTORS_MAX))
    images = [glance.add(CHUNK + 512) for _ in range(IMAGES)]
    with contextlib.ExitStack() as stack:
        for image in images:
            file = stack.enter_context(mount.path_of(image).open("rb", buffering=0))
            assert file.read(512) == image.content[:512]
        for image in images:
            assert read_direct(mount.path_of(image), CHUNK, 512) == image.content[CHUNK:]
        wait_until(lambda: mount.status()["descriptors"] < 64 + 40, "the descriptors' return", 20)
        assert sum(one["open_handles"] for one in mount.status()["images"]) == IMAGES
    assert "Too many open files" not in mount.log()
    assert "Traceback" not in mount.log()
