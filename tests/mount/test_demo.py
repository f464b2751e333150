"""The demo's guest really boots and really checks, and the demo leaves nothing behind however it ends."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lazyimg.demo.boot import BOOT_APPEND, boot_guest
from lazyimg.demo.guest import Guest, build_guest, default_cache_dir
from lazyimg.demo.programs import run_program
from lazyimg.errors import LazyImgError

pytestmark = pytest.mark.slow


@pytest.fixture
def overlay(guest: Guest, tmp_path: Path) -> Path:
    """A qcow2 overlay on the guest's disk, on the local disk."""
    path = tmp_path / "overlay.qcow2"
    argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", guest.disk, path]
    run_program(argv, timeout_s=30)
    return path


def _processes_with(path: Path) -> list[int]:
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
    assert not _processes_with(overlay)


def _checked_sums(guest: Guest) -> list[str]:
    """Return the guest's list of what it checks, read out of its file system."""
    return run_program(["debugfs", "-R", "cat /etc/checked.sha256", guest.disk], timeout_s=30).splitlines()


def _offset_on_disk(guest: Guest, number: int) -> int:
    """Return where on the disk a generated file begins."""
    start = hashlib.shake_128(f"lazyimg demo blob {number}".encode()).digest(4096)
    with guest.disk.open("rb") as disk, mmap.mmap(disk.fileno(), 0, prot=mmap.PROT_READ) as content:
        offset = content.find(start)
    assert offset > 0
    return offset


def test_guest_that_cannot_start_is_named_at_once(guest: Guest, overlay: Path) -> None:
    """A guest that panics ends the wait long before the deadline, with the panic in the message."""
    start = time.monotonic()
    with pytest.raises(LazyImgError, match=r"it ended without its word; it said .*Kernel panic"):
        boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2", append=f"{BOOT_APPEND} rdinit=/no root=/no")
    assert time.monotonic() - start < 60
    assert not _processes_with(overlay)


def test_silent_guest_is_ended_at_the_deadline(guest: Guest, overlay: Path) -> None:
    """A guest that says nothing in time is an error, and its qemu is gone."""
    with pytest.raises(LazyImgError, match="1 s went by without its word"):
        boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2", timeout_s=1)
    assert not _processes_with(overlay)


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
    assert not _processes_with(mark)


def test_failed_program_is_quoted() -> None:
    """The last line of a failed program's standard error is in the error."""
    with pytest.raises(LazyImgError, match="exit code 3: it broke"):
        run_program(["sh", "-c", "echo it broke >&2; exit 3"], timeout_s=5)


class RunningDemo:
    """`lazyimg demo` as a user starts it, with its work folder below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [Path(sys.executable).with_name("lazyimg"), "demo"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "TMPDIR": str(folder), "COLUMNS": "200"},
        )

    def wait_line(self, words: str) -> None:
        """Read its output up to the line with these words."""
        assert self._process.stdout is not None
        seen = []
        for line in self._process.stdout:
            seen.append(line)
            if words in line:
                return
        pytest.fail(f"the demo ended without saying {words!r}: {''.join(seen)}")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait_end(self) -> tuple[int, str]:
        """Return its exit code and the rest of its output."""
        output, _ = self._process.communicate(timeout=150)
        return self._process.returncode, output

    def kill(self) -> None:
        """End it, if it still runs, so that a failed test leaves nothing."""
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def demo(
    guest: Guest, tmp_path_factory: pytest.TempPathFactory, require: Callable[..., None]
) -> Iterator[RunningDemo]:
    """A demo that has just been started on the guest that is there."""
    require("/dev/fuse", "fusermount3")
    # A short path: the control socket's must fit into 108 bytes (unix(7)).
    running = RunningDemo(tmp_path_factory.mktemp("demo"))
    try:
        yield running
    finally:
        running.kill()


def assert_nothing_left(folder: Path) -> None:
    """No mount, no process and no file of the demo is there any more."""
    assert str(folder) not in Path("/proc/self/mountinfo").read_text()
    assert not _processes_with(folder)
    assert list(folder.iterdir()) == []


def test_demo_runs_a_vm_on_an_image_nobody_downloaded(demo: RunningDemo) -> None:
    """The demo boots its guest through the mount, fetches a small part of the image, and cleans up."""
    code, output = demo.wait_end()
    assert code == 0, output
    fetched = re.search(r"requests: ([0-9.]+)% of the download", output)
    assert fetched is not None, output
    assert 0 < float(fetched[1]) < 10
    assert_nothing_left(demo.folder)


@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("guest: kernel", signal.SIGINT),
        ("three images uploaded", signal.SIGTERM),
        ("mounted on", signal.SIGINT),
        ("instance created", signal.SIGTERM),
    ],
)
def test_interrupted_demo_leaves_nothing(demo: RunningDemo, step: str, number: signal.Signals) -> None:
    """A demo interrupted during what follows any of its steps unmounts, ends and removes all it made."""
    demo.wait_line(step)
    demo.signal(number)
    code, output = demo.wait_end()
    assert code == 128 + number, output
    assert_nothing_left(demo.folder)


def test_demo_whose_mount_is_killed_says_so_and_leaves_nothing(demo: RunningDemo) -> None:
    """With the mount killed under the guest, the demo ends with one line and a clean machine."""
    demo.wait_line("instance created")
    mountpoint = next(demo.folder.iterdir()) / "_base"
    for group in {os.getpgid(pid) for pid in _processes_with(mountpoint)}:
        os.killpg(group, signal.SIGKILL)
    code, output = demo.wait_end()
    assert code == 1, output
    assert "guest" in output.splitlines()[-1]
    assert_nothing_left(demo.folder)
