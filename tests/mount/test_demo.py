"""The demo's guest really boots and really checks, and the demo leaves nothing behind however it ends."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyimg.demo.boot import BOOT_APPEND, boot_guest
from lazyimg.demo.guest import Guest, build_guest, default_cache_dir
from lazyimg.demo.programs import run_program, started, wait_first_line, wait_until_ended
from lazyimg.demo.run import is_mounted
from lazyimg.errors import LazyImgError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def guest(require: Callable[..., None]) -> Guest:
    """The demo's guest, from the cache it shares with `lazyimg demo`."""
    require("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dpkg-deb", "apt-get")
    return build_guest(default_cache_dir())


@pytest.fixture
def overlay(guest: Guest, tmp_path: Path) -> Path:
    """A qcow2 overlay on the guest's disk, on the local disk."""
    path = tmp_path / "overlay.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", guest.disk, path]
    run_program(argv, timeout_s=30)
    return path


def _qemus_on(path: Path) -> list[int]:
    """Return the processes that have `path` on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(path).encode() in words and process.name != str(os.getpid()):
            found.append(int(process.name))
    return found


def test_guest_says_which_files_it_checked(guest: Guest, overlay: Path) -> None:
    """The guest boots from an overlay, and its word tells its kernel and at least 20 MB of files."""
    boot = boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2")
    facts = dict(word.split("=") for word in boot.word.split()[1:])
    assert facts["kernel"] == guest.version
    assert int(facts["bytes"]) > 20e6
    assert 0 < boot.seconds < 120
    assert "lazyimg-guest" in boot.serial


def test_guest_reports_one_damaged_block(guest: Guest, overlay: Path) -> None:
    """A single wrong block in a file that is checked makes the guest say so."""
    sums = (line for line in _checked_sums(guest) if "/srv/blob-" in line)
    number = next(sums).rpartition("-")[2].strip()
    offset = _offset_on_disk(guest, int(number))
    run_program(["qemu-io", "-f", "qcow2", "-c", f"write -P 0x5a {offset} 4096", overlay], timeout_s=30)
    with pytest.raises(LazyImgError, match="it says 'failed'"):
        boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2")
    assert not _qemus_on(overlay)


def _checked_sums(guest: Guest) -> list[str]:
    """Return the guest's list of what it checks, read out of its file system."""
    return run_program(["debugfs", "-R", "cat /etc/checked.sha256", guest.disk], timeout_s=30).splitlines()


def _offset_on_disk(guest: Guest, number: int) -> int:
    """Return where on the disk a generated file begins."""
    import hashlib

    start = hashlib.shake_128(f"lazyimg demo blob {number}".encode()).digest(4096)
    with guest.disk.open("rb") as disk, mmap.mmap(disk.fileno(), 0, prot=mmap.PROT_READ) as content:
        offset = content.find(start)
    assert offset > 0
    return offset


def test_guest_that_cannot_start_is_named_at_once(guest: Guest, overlay: Path) -> None:
    """A guest that panics ends the wait long before the deadline, with the console's last line."""
    start = time.monotonic()
    with pytest.raises(LazyImgError, match="it ended without its word; its console ends with"):
        boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2", append=f"{BOOT_APPEND} rdinit=/no root=/no")
    assert time.monotonic() - start < 60
    assert not _qemus_on(overlay)


def test_silent_guest_is_ended_at_the_deadline(guest: Guest, overlay: Path) -> None:
    """A guest that says nothing in time is an error, and its qemu is gone."""
    with pytest.raises(LazyImgError, match="1 s went by without its word"):
        boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2", timeout_s=1)
    assert not _qemus_on(overlay)


def test_guest_is_built_once(guest: Guest) -> None:
    """A second call finds the guest that is there and builds nothing."""
    built: list[str] = []
    assert build_guest(default_cache_dir(), report=built.append) == guest
    assert not built


def test_missing_program_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is not installed is named with Debian's package and the command that installs it."""
    monkeypatch.setattr("lazyimg.demo.programs._SEARCH_PATH", "/nowhere")
    with pytest.raises(LazyImgError, match=r"mkfs\.ext4 .*package e2fsprogs.*make setup"):
        run_program(["mkfs.ext4"], timeout_s=1)


def test_program_over_its_deadline_takes_its_children_with_it(tmp_path: Path) -> None:
    """A program that does not end in time is killed, and so is what it started."""
    mark = tmp_path / "mark"
    script = f"python3 -c 'import time; time.sleep(99)' {mark} & wait"
    with pytest.raises(LazyImgError, match="not finished after 1 s"):
        run_program(["sh", "-c", script], timeout_s=1)
    assert not _qemus_on(mark)


def test_failed_program_is_quoted() -> None:
    """The last line of a failed program's standard error is in the error."""
    with pytest.raises(LazyImgError, match="exit code 3: it broke"):
        run_program(["sh", "-c", "echo it broke >&2; exit 3"], timeout_s=5)
