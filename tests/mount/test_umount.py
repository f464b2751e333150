"""`lazyimg umount` refuses while busy and says who is in the way; `status` answers only while the mount is up."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from real_mount import Mount, is_mounted, is_running, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


def test_umount_ends_the_daemon(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """An idle mount is unmounted, and daemon and holder end with 0."""
    mount = make_mount(glance)
    pid = mount.status()["daemon_pid"]
    result = lazyimg("umount", mount.path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not is_mounted(mount.path)
    assert mount.wait_ended() == 0
    assert not is_running(pid)


def test_busy_umount_is_refused_and_names_who(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """With a file open, a folder worked in and a file mapped, each process is named with what it holds."""
    image = glance.add(MIB)
    mount = make_mount(glance)
    path = mount.path_of(image)
    path.read_bytes()
    commands = {
        f"open {image.base_name}": ["tail", "-f", str(path)],
        "working folder": ["sleep", "600"],
    }
    holders = {
        what: subprocess.Popen(
            command, cwd=mount.path if "folder" in what else "/", stdout=subprocess.DEVNULL
        )
        for what, command in commands.items()
    }
    try:
        wait_until(lambda: mount.status_of(image)["open_handles"] == 1, "tail's open file", 20)
        result = lazyimg("umount", mount.path)
        assert result.returncode == 6
        assert result.stderr.count("\n") == 1
        for what, process in holders.items():
            assert f"pid {process.pid}, {what}" in result.stderr
        assert "lazyimg umount --lazy" in result.stderr
        assert path.read_bytes() == image.content, "it goes on serving"
    finally:
        for process in holders.values():
            process.kill()
            process.wait()
    assert lazyimg("umount", mount.path).returncode == 0
    assert mount.wait_ended() == 0


def test_lazy_umount_lets_open_files_live(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """`--lazy` detaches at once; an open file is read to its end, and with its close the daemon ends."""
    image = glance.add(4 * MIB)
    mount = make_mount(glance)
    with mount.path_of(image).open("rb", buffering=0) as file:
        assert file.read(MIB) == image.content[:MIB]
        assert lazyimg("umount", "--lazy", mount.path).returncode == 0
        assert not is_mounted(mount.path)
        assert os.pread(file.fileno(), MIB, 3 * MIB) == image.content[3 * MIB :]
        assert mount.status()["daemon_pid"]
    assert mount.wait_ended() == 0


def test_umount_of_what_is_not_mounted(tmp_path: Path) -> None:
    """A folder where lazyimg is not mounted, and one that is not there, are refused in one line."""
    for path in (tmp_path, tmp_path / "nonesuch", Path("/proc")):
        result = lazyimg("umount", path)
        assert result.returncode == 10
        assert f"mountpoint {path}: lazyimg is not mounted there" in result.stderr
        assert result.stderr.count("\n") == 1
    assert is_mounted(Path("/proc"))


def test_umount_works_while_reads_hang(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I11] While reads wait for a Glance that is away, umount still answers: it never asks the mount."""
    glance = make_glance()
    image = glance.add(8 * MIB)
    mount = make_mount(glance, read_timeout=4)
    mount.path_of(image).stat()
    glance.stop()
    read = mount.read_later(image, 4 * MIB, 4096)
    wait_until(lambda: mount.status_of(image)["waiting_chunks"] > 0, "the read", 20)
    result = lazyimg("umount", mount.path, timeout_s=10)
    assert result.returncode == 6
    assert f"pid {os.getpid()}" in result.stderr
    with pytest.raises(OSError, match="Input/output error"):
        read.result(60)


def test_status_fails_until_the_mount_is_up(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """`lazyimg status` is exit code 3 before the mount is there and after it is gone, and never in between."""
    mount = make_mount(glance, start=False)

    def status() -> subprocess.CompletedProcess[str]:
        return lazyimg("status", "--json", "--control", mount.control)

    before = status()
    assert (before.returncode, before.stdout, before.stderr.count("\n")) == (3, "", 1)
    process = mount.launch()
    answer = wait_until(lambda: (found := status()).returncode == 0 and found, "status")
    assert is_mounted(mount.path)
    said = json.loads(answer.stdout)
    assert said["images"] == []
    assert said["mountpoint"] == str(mount.path)
    assert is_running(said["daemon_pid"])
    assert said["daemon_pid"] != process.pid
    assert mount.stop() == 0
    assert status().returncode == 3


def test_status_counts_what_was_done(mounted: Mount, glance: ServedGlance) -> None:
    """Status tells of an image its handles, its requests and its bytes, here and fetched."""
    image = glance.add(4 * MIB)
    path = mounted.path_of(image)
    with path.open("rb", buffering=0):
        read_direct(path, 2 * MIB, MIB)
        wait_until(lambda: mounted.status_of(image)["present_bytes"] >= 2 * MIB, "the bytes", 20)
        said = mounted.status_of(image)
    assert said["open_handles"] == 1
    assert said["requests"] == len(glance.data_requests(image))
    assert said["fetched_bytes"] == said["present_bytes"]
    assert (said["source"], said["state"], said["size_bytes"]) == ("ranges", "lazy", 4 * MIB)
    wait_until(lambda: mounted.status_of(image)["open_handles"] == 0, "the release", 20)
