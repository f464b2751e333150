"""A real guest goes on reading, writing and checking its files while the daemon behind its disk dies again and again.

Expected of each test: the guest boots on an image of which nothing is present; it checks other files of its disk
each round, past its page cache, and writes, syncs and reads back one of its own; the daemon dies twenty times, or is
replaced five times, the first time while the guest boots; every round's verdict is ok; told to, the guest ends by
itself, its file system whole.
"""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, wait_until
from served_glance import ServedGlance

from lazyimg.core.identity import base_name
from lazyimg.demo.boot import BOOT_APPEND, disk_options, qemu_command
from lazyimg.demo.glance import EmbeddedGlance
from lazyimg.demo.guest import Guest
from lazyimg.demo.programs import run_program
from lazyimg.demo.ramdisk import write_ramdisk

pytestmark = pytest.mark.slow

KILLS = 20
RESTARTS = 5
IMAGE_ID = "00000000-0000-4000-8000-000000000001"
# Of the disk's 140 files each round checks those whose line number has another remainder.
SLICES = 40
ROUND = re.compile(r"^guest-round (\d+) (\w+)", re.MULTILINE)
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in /modules/*; do /bin/busybox insmod $module; done
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /disk
/bin/busybox mount -t proc proc /disk/proc
/bin/busybox mount -t devtmpfs dev /disk/dev
exec /bin/busybox chroot /disk /bin/busybox sh -c '
    busybox --install -s /bin
    export PATH=/bin
    (read word < /dev/ttyS0; touch /dev/stop) &
    round=0
    until [ -e /dev/stop ]; do
        result=ok
        awk "NR % {SLICES} == $round % {SLICES}" /etc/manifest.sha256 > /dev/checked
        sha256sum -c -s /dev/checked || result=wrong
        head -c 500000 /dev/urandom > /dev/own && cp /dev/own /var/own-$((round % 5)) && sync || result=unwritten
        echo 3 > /proc/sys/vm/drop_caches
        cmp -s /dev/own /var/own-$((round % 5)) || result=lost
        echo "guest-round $round $result"
        round=$((round + 1))
    done
    sync
    mount -o remount,ro / && echo guest-ends
    poweroff -f
'
"""


class RunningGuest:
    """A qemu with the guest's console."""

    def __init__(self, guest: Guest, ramdisk: Path, disk: Path, console: Path) -> None:
        command = qemu_command("tcg", guest.kernel, BOOT_APPEND) + disk_options(ramdisk, disk, "qcow2")
        self._console = console
        with console.open("wb") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT
            )

    def console(self) -> str:
        return self._console.read_text(errors="replace").replace("\r", "")

    def rounds(self) -> list[str]:
        """Return the verdict of each round so far."""
        assert self._process.poll() is None or "guest-ends" in self.console(), self.console()
        return [verdict for _, verdict in ROUND.findall(self.console())]

    def end(self) -> int:
        """Tell the guest to end, and return qemu's exit code."""
        self._process.communicate(b"end\n", timeout=60)
        return self._process.returncode

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def mount(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance], guest: Guest, tmp_path: Path
) -> Mount:
    """A mount of a slow Glance that has the guest's disk as image `IMAGE_ID`."""
    # As `make_glance` names its folder; a record without a hash, since hashing 2 GiB takes seconds.
    stored = EmbeddedGlance(tmp_path / "glance0")
    stored.add_image(guest.disk, id=IMAGE_ID, name="guest", with_hash=False)
    return make_mount(make_glance("--latency-s", "0.02"))


@pytest.fixture
def running(guest: Guest, mount: Mount, tmp_path: Path) -> Iterator[RunningGuest]:
    """The guest, booted on an overlay of its disk under the mount; it is ended with the test."""
    # The kernel unpacks one archive after the other, so that this init takes the place of the first one's.
    own = tmp_path / "own-ramdisk"
    write_ramdisk(own, {"init": INIT.encode()}, folders=())
    ramdisk = tmp_path / "ramdisk"
    ramdisk.write_bytes(guest.ramdisk.read_bytes() + own.read_bytes())
    base, overlay = mount.path / base_name(IMAGE_ID), tmp_path / "overlay.qcow2"
    run_program(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay], timeout_s=30)
    running = RunningGuest(guest, ramdisk, overlay, tmp_path / "console")
    yield running
    running.kill()


@needs_resend
def test_guest_checks_its_files_across_twenty_kills(mount: Mount, running: RunningGuest) -> None:
    """[I9] SIGKILL of the daemon, twenty times under a guest's disk: the guest notices nothing."""
    chance = random.Random(20)
    for _ in range(KILLS):
        time.sleep(chance.uniform(0.1, 0.8))
        mount.new_daemon(mount.kill_daemon())
    assert_well(running, mount)


def test_guest_checks_its_files_across_planned_restarts(mount: Mount, running: RunningGuest) -> None:
    """[I9] `lazyimg restart`, five times under a guest's disk: the guest notices nothing."""
    chance = random.Random(5)
    for _ in range(RESTARTS):
        time.sleep(chance.uniform(0.1, 1.5))
        old_pid, pid = mount.client().restart()
        assert old_pid != pid
    assert_well(running, mount)


def assert_well(guest: RunningGuest, mount: Mount) -> None:
    """The guest goes on for two rounds, and all of its verdicts are ok."""
    checked = len(guest.rounds())
    # The one under way may have begun before the last daemon.
    wait_until(lambda: len(guest.rounds()) >= checked + 2, "two more rounds of the guest")
    assert guest.end() == 0
    assert set(guest.rounds()) == {"ok"}
    assert "guest-ends" in guest.console()
    # It has not read the same again and again.
    assert mount.status()["images"][0]["present_bytes"] > 20e6
