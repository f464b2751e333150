"""A qcow2 image in a store that serves no ranges, through a real mount."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from real_mount import Mount, read_direct, wait_until
from served_glance import MIB, ServedGlance, pattern

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

DISK_BYTES = 12 * MIB


def test_whole_bodies_fail_no_read_of_a_qcow2(
    make_mount: Callable[..., Mount],
    make_glance: Callable[..., ServedGlance],
    tmp_path: Path,
    require: Callable[..., None],
) -> None:
    """[I1] A Glance that answers ranges with whole images, now and then or from now on, costs no read."""
    require("qemu-img")
    expected, source = qcow2(tmp_path)
    glance = make_glance()
    image = glance.add(source, disk_format="qcow2")
    mount = make_mount(glance, view="raw", lookup_timeout=20, hydrate=False)
    path = mount.path_of(image)
    assert read_direct(path, 0, MIB) == expected[:MIB]
    glance.fail(FaultRule("whole_body", image_id=image.id, count=5))
    assert read_direct(path, 3 * MIB, MIB) == expected[3 * MIB : 4 * MIB]
    assert mount.status_of(image)["source"] == "ranges"
    glance.fail(FaultRule("whole_body", image_id=image.id, status=206))
    mount.kill_daemon()
    assert path.read_bytes() == expected
    assert mount.status_of(image)["source"] == "stream"
    assert mount.stop() == 0


@pytest.mark.parametrize("options", [(), ("-c",)], ids=["plain", "compressed"])
def test_qcow2_is_decoded_from_a_stream(
    make_mount: Callable[..., Mount],
    make_glance: Callable[..., ServedGlance],
    tmp_path: Path,
    require: Callable[..., None],
    options: tuple[str, ...],
) -> None:
    """[I1] Its bytes are right in any order and across a kill of the daemon; its spool leaves nothing behind."""
    require("qemu-img")
    expected, source = qcow2(tmp_path, *options)
    glance = make_glance("--no-ranges")
    image = glance.add(source, disk_format="qcow2")
    mount = make_mount(glance, view="raw", lookup_timeout=20)
    path = mount.path_of(image)
    starts = list(range(0, DISK_BYTES, 256 << 10))
    random.Random(5).shuffle(starts)
    for number, start in enumerate(starts):
        if number == len(starts) // 2:
            mount.kill_daemon()
        assert read_direct(path, start, 256 << 10) == expected[start : start + (256 << 10)]
    assert path.read_bytes() == expected
    status = mount.status_of(image)
    assert status["source"] == "stream"
    wait_until(lambda: mount.status_of(image)["state"] == "whole", "the whole image")
    assert mount.stop() == 0
    assert len(list((mount.cache_dir / "chunks").iterdir())) == 1


def qcow2(folder: Path, *options: str) -> tuple[bytes, bytes]:
    """Return a disk's bytes, some of them zeros, and those of a qcow2 made of it."""
    raw, source = folder / "disk.raw", folder / "disk.qcow2"
    raw.write_bytes(pattern(1, 5 * MIB) + bytes(2 * MIB) + pattern(2, DISK_BYTES - 7 * MIB))
    command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, str(raw), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return raw.read_bytes(), source.read_bytes()
