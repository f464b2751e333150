"""Nova and the companion take the same lock of a base: they never race, and neither locks the other out."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from disks import assert_reads_as, info, made_as
from nova_host import NOVA_GID, NOVA_UID, NovaHost
from real_mount import LAZYIMG, Mount, lazyimg, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


def openers(path: Path) -> set[int]:
    """Return the processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path):
                found.add(int(link.parts[2]))
    return found - {os.getpid()}


def test_both_wait_for_the_same_lock(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """While somebody holds `locks/nova-<base>`, neither makes a disk; then both do."""
    image = glance.add(made_as(tmp_path, "qcow2", 12, 8 * MIB), disk_format="qcow2")
    host.spawn(image.id)
    lock_path = host.instances / "locks" / f"nova-{image.base_name}"
    ours, novas = tmp_path / "disk", host.instances / str(uuid.uuid4()) / "disk"
    with lock_path.open("r+b") as lock, ThreadPoolExecutor() as pool:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        spawned = pool.submit(host.nova.spawn, uuid=novas.parent.name, image_id=image.id)
        command = [LAZYIMG, "overlay", "create", image.id, str(ours), "--control", str(mount.control)]
        companion = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        with companion:
            wait_until(lambda: len(openers(lock_path)) == 2, "both at the lock")
            assert not ours.exists()
            assert not novas.exists()
            fcntl.lockf(lock, fcntl.LOCK_UN)
            spawned.result()
            assert companion.wait(60) == 0
    assert info(ours)["backing-filename"] == info(novas)["backing-filename"]


def test_lock_that_the_companion_made_first_is_novas_to_take(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """The file belongs to the owner of the instances folder, though the companion ran as root."""
    image = glance.add(8 * MIB)
    done = lazyimg("overlay", "create", image.id, tmp_path / "disk", "--control", mount.control)
    assert done.returncode == 0, done.stderr
    lock = host.instances / "locks" / f"nova-{image.base_name}"
    assert (lock.stat().st_uid, lock.stat().st_gid) == (NOVA_UID, NOVA_GID)
    assert (lock.parent.stat().st_uid, lock.parent.stat().st_gid) == (NOVA_UID, NOVA_GID)
    host.spawn(image.id)


def test_companion_and_nova_side_by_side(
    make_host: Callable[..., tuple[NovaHost, Mount]], glance: ServedGlance, tmp_path: Path
) -> None:
    """On a base nobody has touched, both at once, four times: every disk reads as its image."""
    host, mount = make_host()
    host.nova.facts()
    for number in range(13, 17):
        image = glance.add(made_as(tmp_path, "qcow2", number, 8 * MIB), disk_format="qcow2")
        ours = tmp_path / f"disk{number}"
        with ThreadPoolExecutor() as pool:
            companion = pool.submit(lazyimg, "overlay", "create", image.id, ours, "--control", mount.control)
            novas = host.spawn(image.id) / "disk"
            assert companion.result().returncode == 0, companion.result().stderr
        for disk in (ours, novas):
            assert_reads_as(disk, "qcow2", number, 8 * MIB)
        assert all(one["range"] for one in glance.data_requests(image))
