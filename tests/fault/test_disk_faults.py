"""A cache disk that fails, hangs or turns read-only under a real mount: guests read on, from Glance if need be.

The cache folder lies on a file system of the tests' own that fails on request.  Expected each time:

    reads fail (EIO)       served from Glance; unstable, then bypass; healed: normal, and read from the disk again
    syncs fail (EIO)       what was written is absent, and served all the same; healed: it is stored
    disk full (ENOSPC)     served without storing; the disk stays normal
    read-only (EROFS)      what is here is read from the disk, the rest served and not stored; healed: stored again
    disk hangs             within disk_timeout reads come from Glance, names and times answer; healed: normal
    bad disk, no Glance    reads wait; Glance or the disk back: they return; neither: EIO after read_timeout
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from bad_disk import DISK_TIMEOUT_S, IMAGE_BYTES, check
from faulty_disk import CHANGES, SYNCS, FaultyDisk
from real_mount import Mount, is_mounted, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage

pytestmark = pytest.mark.slow

CHUNK = 1 << 16
# What a busy machine may add.
GRACE_S = 5.0


def state(mount: Mount) -> str:
    return str(mount.status()["disk_state"])


def wait_normal(mount: Mount) -> None:
    wait_until(lambda: state(mount) == "normal", "the disk's recovery", 30)


def asked(glance: ServedGlance, image: ServedImage) -> int:
    return len(glance.data_requests(image))


def test_hanging_disk_keeps_nobody_waiting(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I6] Every operation on the disk hangs: present and absent bytes come from Glance, and names answer.

    hang: reads of both kinds return within disk_timeout, status says bypass; lookup, listing, utime, open answer.
    heal: normal again; the time that was set is kept; what is read now is stored; nothing is wrong.
    """
    absent = glance.add(IMAGE_BYTES)
    check(mount, absent, 0)
    before = asked(glance, whole)
    faulty_disk.strike(hang=True)
    began_s = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        reads = [pool.submit(check, mount, image, at) for image in (whole, absent) for at in range(4)]
        for read in reads:
            read.result(60)
    assert time.monotonic() - began_s < DISK_TIMEOUT_S + GRACE_S
    assert asked(glance, whole) > before
    status = mount.status()
    assert status["disk_state"] == "bypass"
    assert "takes longer than 2 s" in status["disk_error"]
    assert status["disk_bypassed_bytes"] >= IMAGE_BYTES
    assert 0 < status["disk_stuck_operations"] <= 20
    began_s = time.monotonic()
    path = mount.path_of(whole)
    assert path.stat().st_size == IMAGE_BYTES
    assert whole.base_name in os.listdir(mount.path)
    os.utime(path, (1_000_000, 1_000_000))
    assert path.read_bytes() == whole.content
    check(mount, absent, *range(4))
    assert time.monotonic() - began_s < GRACE_S
    assert mount.log().count("not used from here on") == 1
    faulty_disk.heal()
    wait_normal(mount)
    assert path.stat().st_mtime == 1_000_000
    before = asked(glance, whole)
    check(mount, whole, *range(4))
    assert asked(glance, whole) == before
    check(mount, absent, *range(4))
    wait_until(lambda: mount.status_of(absent)["state"] == "whole", "the image that came meanwhile", 20)
    assert lazyimg("verify", absent.id, "--control", mount.control).returncode == 0
    assert mount.status()["disk_stuck_operations"] == 0
    assert "Traceback" not in mount.log()
    assert mount.stop() == 0
    mount.start()
    assert path.stat().st_mtime == 1_000_000


def test_failing_reads_come_from_glance_until_they_do_not(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I1] Every read of the chunk files fails with EIO: all bytes are right, the state says so once a change.

    first errors: unstable; more: bypass; healed: normal; what the disk gave up is fetched and stored again.
    """
    before = asked(glance, whole)
    faulty_disk.strike("read", path="cache/chunks/*", error=errno.EIO)
    for _ in range(3):
        check(mount, whole, *range(4))
    assert asked(glance, whole) > before
    status = mount.status()
    assert status["disk_state"] in ("unstable", "bypass")
    assert "Input/output error" in status["disk_error"]
    faulty_disk.heal()
    wait_normal(mount)
    check(mount, whole, *range(4))
    wait_until(lambda: mount.status_of(whole)["state"] == "whole", "the chunks that were given up", 20)
    before = asked(glance, whole)
    check(mount, whole, *range(4))
    assert asked(glance, whole) == before
    assert mount.log().count("cache disk") <= 12
    assert "Traceback" not in mount.log()


def test_failing_syncs_leave_nothing_durable_that_is_not(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance
) -> None:
    """[I2] Each fsync fails with EIO: reads go on, nothing counts as present for good; healed, it is stored."""
    image = glance.add(IMAGE_BYTES)
    check(mount, image, 0)
    faulty_disk.strike(*SYNCS, error=errno.EIO)
    check(mount, image, *range(4))
    wait_until(lambda: state(mount) == "bypass", "the end of the disk's use", 20)
    check(mount, image, *range(4))
    faulty_disk.heal()
    wait_normal(mount)
    check(mount, image, *range(4))
    wait_until(lambda: mount.status_of(image)["state"] == "whole", "the image", 20)
    mount.kill_everything()
    mount.start()
    check(mount, image, *range(4))
    assert lazyimg("verify", image.id, "--control", mount.control).returncode == 0


def test_full_disk_is_no_failing_disk(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I1] Every change of the chunk files fails with ENOSPC: all is read rightly, and the disk stays normal."""
    image = glance.add(IMAGE_BYTES)
    faulty_disk.strike("write", path="cache/chunks/*", error=errno.ENOSPC)
    for _ in range(2):
        check(mount, image, *range(4))
        check(mount, whole, *range(4))
    assert mount.status_of(image)["present_bytes"] < IMAGE_BYTES
    status = mount.status()
    assert (status["disk_state"], status["disk_errors"]) == ("normal", 0)
    assert "No space left" in mount.log()


def test_read_only_disk_is_read_and_not_written(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I6] The disk turns read-only: what is here is read from it, the rest from Glance; healed, it is written."""
    image = glance.add(IMAGE_BYTES)
    check(mount, image, 0)
    faulty_disk.strike(*CHANGES, *SYNCS, error=errno.EROFS)
    check(mount, image, *range(1, 4))
    wait_until(lambda: mount.status()["disk_is_read_only"], "the word that the disk is read-only", 20)
    before = asked(glance, whole)
    check(mount, whole, *range(4))
    assert asked(glance, whole) == before
    os.utime(mount.path_of(whole), (2_000_000, 2_000_000))
    assert mount.path_of(whole).stat().st_mtime == 2_000_000
    check(mount, image, *range(4))
    faulty_disk.heal()
    wait_normal(mount)
    check(mount, image, *range(4))
    wait_until(lambda: mount.status_of(image)["state"] == "whole", "the image", 20)
    assert mount.path_of(whole).stat().st_mtime == 2_000_000


def test_bad_disk_without_glance_waits_for_either(
    faulty_disk: FaultyDisk, make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I1] Disk and Glance are both away: reads wait; the disk's return ends that, else EIO after read_timeout."""
    glance = make_glance()
    image = glance.add(IMAGE_BYTES)
    mount = make_mount(
        glance, cache_dir=faulty_disk.path / "cache", disk_timeout=DISK_TIMEOUT_S, read_timeout=6
    )
    try:
        mount.fetch_all(image)
        glance.stop()
        faulty_disk.strike(hang=True)
        with pytest.raises(OSError, match="Input/output error"):
            read_direct(mount.path_of(image), 0, MIB)
        read = mount.read_later(image, MIB, MIB)
        with contextlib.suppress(TimeoutError):
            read.result(1)
        assert not read.done()
        faulty_disk.heal()
        assert read.result(8) == image.content[MIB : 2 * MIB]
        check(mount, image, *range(4))
    finally:
        faulty_disk.heal()


def test_hanging_disk_does_not_keep_the_mount(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I6] While the disk hangs the mount can be ended; what is left of the daemon ends with what hangs."""
    # Not the index: unlike a disk, this file system lets nobody close a mapped file of its own while it hangs.
    for path in ("cache/chunks/*", "cache/probe"):
        faulty_disk.strike(path=path, hang=True)
    check(mount, whole, 0)
    assert state(mount) == "bypass"
    mount.begin_stop()
    wait_until(lambda: not is_mounted(mount.path), "the mount's end", 2 * DISK_TIMEOUT_S + GRACE_S)
    wait_until(
        lambda: "ending without closing the cache" in mount.log(),
        "the daemon's end",
        2 * DISK_TIMEOUT_S + GRACE_S,
    )
    faulty_disk.heal()
    assert mount.wait_ended() == 0


def test_failing_disk_hides_no_known_image(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I6] Every operation fails with EIO before an image was opened: it is listed, looked up, opened and read."""
    # In use, so that it is listed.
    check(mount, whole, 0)
    assert mount.stop() == 0
    mount.start()
    faulty_disk.strike(error=errno.EIO)
    assert whole.base_name in os.listdir(mount.path)
    with mount.path_of(whole).open("rb", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == IMAGE_BYTES
        check(mount, whole, *range(4))
    faulty_disk.heal()
    wait_normal(mount)
    check(mount, whole, *range(4))
    assert "Traceback" not in mount.log()
