"""A daemon that dies while its cache disk hangs, fails or is read-only: the next one serves guests all the same.

Expected each time:

    disk bad, daemon killed    the next is ready within disk_timeout and a moment, serves open files and names from
                               Glance and says bypass; a read of what only the disk has waits
    killed again               the same
    disk back                  another daemon takes the mount, on its own; normal; read from the disk again
    first daemon of a mount    refused with one line, as ever; nothing is left
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_disk import IMAGE_BYTES, check
from faulty_disk import CHANGES, LOOKS, SYNCS, FaultyDisk
from kernel_marks import needs_resend
from real_mount import Mount, is_mounted, lazyimg, opened, wait_until
from served_glance import MIB, ServedGlance, ServedImage, pattern

pytestmark = pytest.mark.slow


@pytest.fixture
def read_timeout_s() -> int:
    """Above the longest pause between two probes of the disk, and what a busy machine adds."""
    return 60


Strike = Callable[[FaultyDisk], None]
STRIKES: dict[str, Strike] = {
    "hangs": lambda disk: disk.strike(hang=True),
    "fails": lambda disk: disk.strike(error=errno.EIO),
    "read-only": lambda disk: disk.strike(*CHANGES, *SYNCS, error=errno.EROFS),
    "full": lambda disk: disk.strike(*CHANGES, error=errno.ENOSPC),
}


def wait_normal(mount: Mount, last_pid: int) -> None:
    """Wait until another daemon than this has a disk that is well."""

    def is_normal() -> bool:
        status = mount.status()
        return bool(status["daemon_pid"] != last_pid and status["disk_state"] == "normal")

    def tried() -> bool:
        # While one daemon ends and the other takes up, nobody answers.
        with contextlib.suppress(Exception):
            return is_normal()
        return False

    wait_until(tried, "a daemon that uses the cache again", 60)


def stand_in(mount: Mount) -> bool:
    return mount.control.with_name(f"{mount.control.name}.cache").exists()


@needs_resend
@pytest.mark.parametrize("strike", STRIKES.values(), ids=STRIKES)
def test_killed_daemon_is_replaced_on_a_bad_disk(
    strike: Strike, faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I9] Open files, names, times and the upper folder go on from Glance, twice; then the disk is used again."""
    partly = glance.add(IMAGE_BYTES)
    check(mount, partly, 0)
    with opened(mount.path_of(whole), os.O_RDONLY | os.O_DIRECT) as fd:
        strike(faulty_disk)
        for second in (1_000_000, 2_000_000):
            pid = mount.new_daemon(mount.kill_daemon())
            status = mount.status()
            assert status["disk_state"] == "bypass"
            assert status["disk_error"]
            assert os.pread(fd, 4096, 0) == whole.content[:4096]
            check(mount, whole, *range(4))
            check(mount, partly, *range(4))
            assert sorted(os.listdir(mount.path)) == sorted(
                name
                for name in {whole.base_name, partly.base_name, "upper"}
                if name != "upper" or second > 1_000_000
            )
            (mount.path / "upper").write_bytes(b"upper")
            os.utime(mount.path_of(whole), (second, second))
            assert stand_in(mount)
        faulty_disk.heal()
        wait_normal(mount, pid)
        before = len(glance.data_requests(whole))
        assert os.pread(fd, 4096, MIB) == whole.content[MIB : MIB + 4096]
        check(mount, whole, *range(4))
        assert len(glance.data_requests(whole)) == before
        assert not stand_in(mount)
    assert mount.path_of(whole).stat().st_mtime == 2_000_000
    assert mount.status_of(whole)["open_handles"] == 0
    assert lazyimg("verify", whole.id, "--control", mount.control).returncode == 0
    assert "Traceback" not in mount.log()
    assert mount.stop() == 0


@needs_resend
def test_decoded_image_goes_on_without_its_cache(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """[I9] A qcow2 image that is shown raw is decoded anew from Glance, its header and tables too."""
    content = pattern(7, IMAGE_BYTES)
    raw, packed = tmp_path / "raw", tmp_path / "qcow2"
    raw.write_bytes(content)
    subprocess.run(
        ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", str(raw), str(packed)],
        check=True,
        timeout=60,
    )
    image = glance.add(packed.read_bytes(), "qcow2")
    with opened(mount.path_of(image), os.O_RDONLY | os.O_DIRECT) as fd:
        assert os.pread(fd, MIB, 0) == content[:MIB]
        faulty_disk.strike(error=errno.EIO)
        pid = mount.new_daemon(mount.kill_daemon())
        assert mount.status()["disk_state"] == "bypass"
        assert os.pread(fd, IMAGE_BYTES, 0) == content
        faulty_disk.heal()
        wait_normal(mount, pid)
        assert os.pread(fd, IMAGE_BYTES, 0) == content


@needs_resend
def test_what_only_the_disk_has_is_waited_for(
    faulty_disk: FaultyDisk, mount: Mount, glance: ServedGlance, whole: ServedImage
) -> None:
    """[I1] An image that Glance has lost since is read when the disk is back, by a read that began before."""
    check(mount, whole, 0)
    glance.delete(whole)
    wait_until(
        lambda: lazyimg("prefetch", whole.id, "--control", mount.control) and gone(mount, whole), "gone"
    )
    with opened(mount.path_of(whole), os.O_RDONLY | os.O_DIRECT):
        faulty_disk.strike(error=errno.EIO)
        pid = mount.new_daemon(mount.kill_daemon())
        read = mount.read_later(whole, MIB, 4096)
        wait_until(lambda: mount.status()["reads_in_flight"], "the read")
        assert mount.status()["disk_state"] == "bypass"
        assert not read.done()
        faulty_disk.heal()
        assert read.result(60) == whole.content[MIB : MIB + 4096]
        wait_normal(mount, pid)


def gone(mount: Mount, image: ServedImage) -> bool:
    return bool(mount.status_of(image)["state"] == "gone")


@needs_resend
def test_mount_is_ended_while_its_cache_is_away(
    faulty_disk: FaultyDisk, mount: Mount, whole: ServedImage
) -> None:
    """[I9] What stands in for a cache that cannot be opened ends with the mount and leaves nothing behind."""
    faulty_disk.strike(hang=True)
    mount.new_daemon(mount.kill_daemon())
    check(mount, whole, 0)
    assert mount.stop() == 0
    assert not is_mounted(mount.path)
    assert not stand_in(mount)
    faulty_disk.heal()
    mount.start()
    check(mount, whole, *range(4))


def test_first_daemon_of_a_mount_needs_its_cache(
    faulty_disk: FaultyDisk, mount: Mount, whole: ServedImage
) -> None:
    """[I6] `lazyimg mount` itself says within disk_timeout that the disk hangs, and leaves nothing mounted."""
    assert mount.stop() == 0
    faulty_disk.strike(*LOOKS, hang=True)
    process = mount.launch()
    assert process.wait(30) == 9
    assert "takes longer" in mount.log() or "no answer" in mount.log()
    assert not is_mounted(mount.path)
    assert not stand_in(mount)
