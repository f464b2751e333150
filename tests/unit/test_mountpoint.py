"""The mountpoint from outside: what is mounted, who holds it, what is refused."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyimg.daemon import mountpoint
from lazyimg.daemon.mountpoint import Holder, check_mountpoint, describe, holders_of, mounted_type, umount
from lazyimg.errors import InUse, MountFailed


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """Another file system, mounted at a path that /proc writes with escapes."""
    if os.geteuid() != 0:
        pytest.skip("root is missing here: mounting needs it")
    where = tmp_path / "a blank, a \\, a tab\t and ü"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(where)], check=True)
    yield where
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def test_type_of_a_mount_is_found(tmpfs: Path, tmp_path: Path) -> None:
    """The type is that of the mount exactly there, whatever its path is; a folder below it has none."""
    assert mounted_type(Path("/proc")) == "proc"
    assert mounted_type(tmpfs) == "tmpfs"
    assert mounted_type(tmp_path) is None
    (tmpfs / "below").mkdir()
    assert mounted_type(tmpfs / "below") is None
    status = os.stat(tmpfs)
    assert mountpoint.device_of(tmpfs) == f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    assert mountpoint.device_of(tmp_path) is None


def test_free_folder_is_accepted(tmp_path: Path) -> None:
    """A folder with nothing mounted on it may be mounted on."""
    check_mountpoint(tmp_path)


def test_folder_in_use_is_refused(tmpfs: Path) -> None:
    """Another file system there is named, and left alone."""
    with pytest.raises(InUse, match="a tmpfs file system is mounted there"):
        check_mountpoint(tmpfs)
    assert mounted_type(tmpfs) == "tmpfs"


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    """A file and a name that is not there are refused with what to do."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(MountFailed, match="not a folder"):
        check_mountpoint(tmp_path / "file")
    with pytest.raises(MountFailed, match="create the folder first"):
        check_mountpoint(tmp_path / "nonesuch")


def test_holders_are_named_with_what_they_hold(tmpfs: Path) -> None:
    """An open file and a working folder are found; files elsewhere are not, nor are we ourselves."""
    (tmpfs / "file").write_bytes(b"x")
    with (
        (tmpfs / "file").open("rb") as file,
        subprocess.Popen(["sleep", "60"], stdin=file, cwd="/") as opener,
        subprocess.Popen(["sleep", "60"], cwd=tmpfs) as worker,
        subprocess.Popen(["sleep", "60"], cwd="/") as stranger,
    ):
        try:
            found = {holder.pid: holder for holder in holders_of(tmpfs)}
        finally:
            for process in (opener, worker, stranger):
                process.kill()
    assert found == {
        opener.pid: Holder(opener.pid, "sleep", "open file"),
        worker.pid: Holder(worker.pid, "sleep", "working folder"),
    }


def test_many_holders_are_counted() -> None:
    """A message names the first few and counts the rest; none at all are put down to the kernel."""
    holders = [Holder(pid, "qemu", "open disk") for pid in range(1, 14)]
    assert describe(holders[:2]) == "qemu (pid 1, open disk), qemu (pid 2, open disk)"
    assert describe(holders).endswith("qemu (pid 10, open disk) and 3 more")
    assert "kernel" in describe([])


def test_umount_of_others_is_refused(tmpfs: Path) -> None:
    """Only lazyimg's own mounts are unmounted, lazily or not."""
    for lazy in (False, True):
        with pytest.raises(MountFailed, match="lazyimg is not mounted there"):
            umount(tmpfs, lazy=lazy)
    assert mounted_type(tmpfs) == "tmpfs"


def test_missing_fusermount_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without fusermount3 the error names the package."""
    monkeypatch.setattr(mountpoint, "FUSERMOUNT", "fusermount-nonesuch")
    with pytest.raises(MountFailed, match="install the package fuse3"):
        mountpoint.mount(tmp_path, allow_other=True)


def test_fusermounts_own_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fusermount3 said is in the error, in one line."""
    program = tmp_path / "fusermount"
    program.write_text("#!/bin/sh\necho 'first line' >&2\necho 'fusermount: no permission' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(mountpoint, "FUSERMOUNT", str(program))
    with pytest.raises(MountFailed, match="fusermount: no permission") as caught:
        mountpoint.mount(tmp_path, allow_other=True)
    assert "\n" not in str(caught.value)


def test_fusermount_without_a_descriptor_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fusermount3 that ends well and hands nothing over is no mount."""
    monkeypatch.setattr(mountpoint, "FUSERMOUNT", "true")
    with pytest.raises(MountFailed, match="handed over no descriptor"):
        mountpoint.mount(tmp_path, allow_other=False)
