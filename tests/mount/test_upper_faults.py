"""The upper folder on a disk that is full or read-only, and under a daemon that is killed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB below where a mount will be."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to mount a tmpfs")
    path = tmp_path / "m" / "_base" / "disk"
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], check=True)
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def mount_on(make_mount: Callable[..., Mount], glance: ServedGlance) -> Callable[[], Mount]:
    """Return what mounts over `small_disk`, and takes that mount away before the disk itself goes."""
    return lambda: make_mount(glance)


def test_full_disk_is_told_and_forgotten(small_disk: Path, mount_on: Callable[[], Mount]) -> None:
    """A write that the disk has no room for says ENOSPC, in the log too, and room made is room had."""
    mount = mount_on()
    path = small_disk / "large"
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        # Short writes first, then an error.
        [file.write(bytes(MIB)) for _ in range(8)]
    assert 3 * MIB < path.stat().st_size <= 4 * MIB
    assert mount.log().count("beneath the mount: write: No space left on device") == 1
    path.unlink()
    small = small_disk / "small"

    def is_written() -> bool:
        # The room comes back when the kernel forgets the file, a moment after the last close.
        try:
            small.write_bytes(b"x" * 3 * MIB)
        except OSError:
            return False
        return True

    wait_until(is_written, "the room of the removed file", 10)
    assert small.read_bytes() == b"x" * 3 * MIB


def test_read_only_disk_says_so(small_disk: Path, mount_on: Callable[[], Mount]) -> None:
    """On a read-only file system each change is EROFS, and what is there is read."""
    (small_disk / "file").write_bytes(b"content")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    mount_on()
    path = small_disk / "file"
    changes: list[Callable[[], object]] = [
        lambda: path.write_bytes(b"x"),
        lambda: path.unlink(),
        lambda: path.chmod(0o600),
        lambda: path.rename(small_disk / "other"),
        lambda: os.utime(path),
        lambda: (small_disk / "new").touch(),
        lambda: (small_disk / "folder").mkdir(),
        lambda: (small_disk / "link").symlink_to("x"),
    ]
    for change in changes:
        with pytest.raises(OSError, match="Read-only file system"):
            change()
    assert path.read_bytes() == b"content"


@needs_resend
def test_writing_goes_on_under_the_next_daemon(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] Two files written without a pause while the daemon is killed five times have every byte in its place."""
    mount = make_mount(glance)
    ending = threading.Event()
    one = mount.path / "one"

    def write(name: str) -> bytes:
        written = bytearray()
        with (mount.path / name).open("wb", buffering=0) as file:
            while not ending.is_set():
                block = os.urandom(100_000)
                file.write(block)
                written += block
            os.fsync(file.fileno())
        return bytes(written)

    with ThreadPoolExecutor(2) as pool:
        writers = {name: pool.submit(write, name) for name in ("one", "two")}
        try:
            for _ in range(5):
                size_bytes = one.stat().st_size if one.exists() else 0
                wait_until(
                    lambda size=size_bytes: (
                        any(writer.done() for writer in writers.values())
                        or (one.exists() and one.stat().st_size > size)
                    ),
                    "writing",
                )
                # A write that failed says why.
                assert [writer.result() for writer in writers.values() if writer.done()] == []
                mount.kill_daemon()
                wait_until(mount.is_ready, "the next daemon")
        finally:
            ending.set()
        for name, writer in writers.items():
            assert (mount.path / name).read_bytes() == writer.result(60)


def test_two_appenders_lose_nothing(mounted: Mount) -> None:
    """Lines that two processes append to one file at the same time are all there, each whole."""
    path = mounted.path / "appended"
    program = "import os, sys; fd = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)\n"
    program += "for n in range(300): os.write(fd, f'{sys.argv[2]} {n:05}\\n'.encode())"
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    lines = path.read_text().splitlines()
    assert sorted(lines) == sorted(f"{name} {number:05}" for name in "ab" for number in range(300))


def test_unlinked_file_lives_until_it_is_closed(mounted: Mount) -> None:
    """A file without a name is written and read as long as it is open."""
    path = mounted.path / "unlinked"
    with path.open("w+b", buffering=0) as file:
        path.unlink()
        file.write(b"still here")
        assert os.fstat(file.fileno()).st_nlink == 0
        assert os.pread(file.fileno(), 100, 0) == b"still here"
        (path).write_bytes(b"another")
        assert os.pread(file.fileno(), 100, 0) == b"still here"


def test_direct_io_is_taken(mounted: Mount) -> None:
    """A file opened with O_DIRECT, as qemu-img does, is written and read, aligned or not."""
    path = mounted.path / "direct"
    fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CREAT)
    try:
        assert os.pwrite(fd, b"x" * 1000, 7) == 1000
        assert os.pread(fd, 5000, 0) == bytes(7) + b"x" * 1000
    finally:
        os.close(fd)


def test_what_cannot_be_is_answered_as_unsupported(mounted: Mount) -> None:
    """fallocate, extended attributes and O_TMPFILE are EOPNOTSUPP, and posix_fallocate does without."""
    path = mounted.path / "file"
    path.write_bytes(b"")
    attempts: list[Callable[[], object]] = [
        lambda: os.setxattr(path, "user.x", b"1"),
        lambda: os.getxattr(path, "user.x"),
        lambda: os.open(mounted.path, os.O_TMPFILE | os.O_RDWR),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="not supported") as caught:
            attempt()
        assert caught.value.errno == errno.EOPNOTSUPP
    assert subprocess.run(["fallocate", "-l", "4096", path], capture_output=True, check=False).returncode != 0
    fd = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(fd, 0, 10_000)
    finally:
        os.close(fd)
    assert path.stat().st_size == 10_000


def test_folder_replaced_under_the_mount_is_the_one_that_was_mounted_over(
    make_mount: Callable[..., Mount], glance: ServedGlance, tmp_path: Path
) -> None:
    """What is put over the upper folder beneath the mount changes nothing; to move it away is EBUSY."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to look beneath the mount")
    image = glance.add(MIB)
    mount = make_mount(glance, start=False)
    (mount.path / "kept").write_bytes(b"kept")
    beneath = tmp_path / "beneath"
    beneath.mkdir()
    subprocess.run(["mount", "--bind", str(mount.path.parent), str(beneath)], check=True)
    folder = beneath / mount.path.name
    try:
        mount.start()
        with pytest.raises(OSError, match="busy"):
            folder.rename(beneath / "moved")
        with os.scandir(folder) as original:
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], check=True)
            (folder / "false").write_bytes(b"false")
            assert os.listdir(mount.path) == ["kept"]
            (mount.path / "made").write_bytes(b"made")
            assert mount.path_of(image).read_bytes() == image.content
            assert os.listdir(folder) == ["false"]
            assert {entry.name for entry in original} == {"kept", "made"}
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)
        subprocess.run(["umount", "-l", str(beneath)], check=True)
