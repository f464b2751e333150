"""Status answers while everything else hangs, and says what each read waits for."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from faulty_disk import FaultyDisk
from real_mount import Mount, wait_until
from served_glance import ServedGlance

from lazyimg.demo.faults import FaultRule
from lazyimg.logs import BURST_LINES

MIB = 1 << 20
# Far above what an answer takes on a busy machine, far below what the reads wait.
AT_ONCE_S = 5


def status_at_once(mount: Mount) -> dict[str, Any]:
    began_s = time.monotonic()
    answer = mount.status()
    assert time.monotonic() - began_s < AT_ONCE_S
    return answer


# A guest reads 4 KiB that are absent; Glance takes the request and sends nothing.
# → status answers at once: one read, of these bytes, waits for Glance; the image is at risk.
# Glance answers again → the read returns the right bytes, and no read waits.
def test_read_that_glance_stalls_is_named(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """While Glance stalls, status answers at once and names the read, its bytes and what it waits for."""
    glance = make_glance()
    image = glance.add(8 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    glance.fail(FaultRule("stall", image_id=image.id, count=1, seconds=3))
    read = mount.read_later(image, 4 * MIB, 4096)
    (waiting,) = wait_until(lambda: status_at_once(mount)["reads"], "the read to be seen")
    assert (waiting["image"], waiting["start"], waiting["stop"]) == (image.id, 4 * MIB, 4 * MIB + 4096)
    wait_until(lambda: mount.status()["reads"][0]["waits_for"] == "glance", "the request to be out")
    assert "lazyimg_reads_in_flight 1.0\n" in mount.client().metrics()
    assert "lazyimg_images_at_risk 1.0\n" in mount.client().metrics()
    assert read.result(60) == image.content[4 * MIB : 4 * MIB + 4096]
    wait_until(lambda: not status_at_once(mount)["reads"], "the end of the read")
    assert mount.status()["requests_in_flight"] == 0


# An image is present, its daemon new: its chunks are not proven yet.  The cache disk hangs.
# A guest reads → the read waits for the cache disk; status answers at once and says so, a dump shows its thread.
# The disk comes back → the read returns the right bytes.
def test_read_that_the_cache_disk_hangs_is_named(
    faulty_disk: FaultyDisk, make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """While the cache disk hangs, status and metrics answer at once and say that a read waits for it."""
    image = glance.add(2 * MIB)
    mount = make_mount(glance, cache_dir=faulty_disk.path / "cache")
    mount.fetch_all(image)
    mount.stop()
    mount.start()
    mount.path_of(image).stat()
    faulty_disk.strike("read", path="*/chunks/*", hang=True)
    read = mount.read_later(image, MIB, 4096)
    wait_until(
        lambda: [one["waits_for"] for one in status_at_once(mount)["reads"]] == ["cache"],
        "the read to be seen",
    )
    assert "lazyimg_reads_in_flight 1.0\n" in mount.client().metrics()
    os.kill(mount.status()["daemon_pid"], signal.SIGUSR1)
    wait_until(lambda: "end of dump" in mount.log(), "the dump")
    # The thread that hangs, as faulthandler shows it.
    assert re.search(r'File ".*/lazyimg/store/.*", line \d+ in ', mount.log())
    faulty_disk.heal()
    assert read.result(60) == image.content[MIB : MIB + 4096]


# A guest's read waits for Glance, which sends nothing.  The holder gets SIGUSR1.
# → the daemon's log has its threads, its tasks and the read; it goes on serving.
def test_dump_while_a_read_hangs(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """SIGUSR1 to the holder makes the daemon write its threads, tasks and waiting reads, and harms nothing."""
    glance = make_glance()
    image = glance.add(8 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    glance.fail(FaultRule("stall", image_id=image.id, count=1, seconds=3))
    read = mount.read_later(image, 4 * MIB, 4096)
    wait_until(lambda: mount.status()["reads"], "the read to be seen")
    pid = mount.status()["daemon_pid"]
    os.kill(mount.holder_pid, signal.SIGUSR1)
    wait_until(lambda: "end of dump" in mount.log(), "the dump")
    dump = mount.log()
    assert f"dump of daemon {pid}: " in dump
    assert f"image {image.id}: [{4 * MIB}, {4 * MIB + 4096})" in dump
    # What faulthandler writes, and what trio knows of a task.
    assert re.search(r"^(Current )?[Tt]hread 0x", dump, re.MULTILINE)
    assert re.search(r"image/lazyimage\.py:\d+ read$", dump, re.MULTILINE)
    assert read.result(60) == image.content[4 * MIB : 4 * MIB + 4096]
    assert mount.status()["daemon_pid"] == pid


# Glance stops; 60 reads of absent chunks wait for `read_timeout`, each gets EIO, each would say so in the log.
# → the log has a burst of them; status and the daemon go on.
def test_storm_of_failed_reads_does_not_flood_the_log(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I5] A fault that befalls many reads writes a burst of lines, not one for each."""
    glance = make_glance()
    image = glance.add(16 * MIB)
    mount = make_mount(glance, read_timeout=1)
    mount.path_of(image).stat()
    glance.stop()
    reads = [mount.read_later(image, 2 * MIB + number * 65536, 4096) for number in range(60)]
    for read in reads:
        with pytest.raises(OSError, match="Input/output error"):
            read.result(60)
    told = [line for line in mount.log().splitlines() if "did not come within" in line]
    assert len(told) == BURST_LINES
    assert mount.status()["reads_in_flight"] == 0
