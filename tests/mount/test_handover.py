"""One daemon gives the mount to the next, killed as it may be: what guests had open goes on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, is_mounted, is_running, lazyimg, opened, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.daemon.handles import Handles
from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

STEP = 96 << 10


def test_killed_daemon_keeps_files_without_a_name(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] Files unlinked or renamed while open are read, written and looked at after SIGKILL, as often as it strikes.

    open two handles, unlink   kill   read, write, fstat   close one   kill   the other still reads all
    """
    mount = make_mount(glance)
    (mount.path / "folder").mkdir()
    with (
        opened(mount.path / "a", os.O_RDWR | os.O_CREAT) as one,
        opened(mount.path / "b", os.O_RDWR | os.O_CREAT) as moved,
    ):
        other = os.open(mount.path / "a", os.O_RDONLY)
        assert os.write(one, b"content") == os.write(moved, b"content") == 7
        (mount.path / "a").unlink()
        (mount.path / "b").rename(mount.path / "folder" / "c")
        mount.new_daemon(mount.kill_daemon())
        assert os.pread(one, 100, 0) == os.pread(other, 100, 0) == b"content"
        assert os.pwrite(one, b" more", 7) == 5
        found = os.fstat(one)
        assert (found.st_nlink, found.st_size) == (0, 12)
        os.close(other)
        assert os.pread(moved, 100, 0) == b"content"
        mount.new_daemon(mount.kill_daemon())
        assert os.pread(one, 100, 0) == b"content more"
        assert os.pwrite(moved, b"C", 0) == 1
    assert (mount.path / "folder" / "c").read_bytes() == b"Content"
    assert mount.stop() == 0


def test_handles_are_counted_across_daemons(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """[I7] An image opened under a killed daemon is kept for as long as it is open, and can be dropped after that."""
    image = glance.add(MIB)
    mount = make_mount(glance)
    with opened(mount.path_of(image), os.O_RDONLY) as fd:
        mount.new_daemon(mount.kill_daemon())
        result = lazyimg("evict", image.id, "--control", mount.control)
        assert (result.returncode, "open by 1 handles" in result.stderr) == (6, True), result.stderr
        assert os.pread(fd, 4096, 0) == image.content[:4096]
    wait_until(lambda: mount.status_of(image)["open_handles"] == 0, "the release")
    assert lazyimg("evict", image.id, "--control", mount.control).returncode == 0


def test_open_that_nobody_answered_keeps_nothing(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I7] A daemon killed between counting an open and answering it leaves no handle that nobody can close.

    count 1 more of an open file, as such a daemon does   unlink and close it   its room is free again
    count 1 of an image, kill                             unlink it             its chunks go
    count 1 of what the kernel does not know              kill                  it is forgotten
    """
    image = glance.add(MIB)
    mount = make_mount(glance)
    handles = counted_handles(mount)
    with opened(mount.path / "a", os.O_RDWR | os.O_CREAT) as fd:
        handles.opened(os.fstat(fd).st_ino)
        (mount.path / "a").unlink()
        assert deleted_files_of(mount.holder_pid)
    wait_until(lambda: not deleted_files_of(mount.holder_pid), "the holder to close the file")
    path = mount.path_of(image)
    assert path.read_bytes() == image.content
    wait_until(lambda: not counted_handles(mount).all(), "the release")
    handles.opened(path.stat().st_ino)
    handles.opened(1 << 62)
    mount.new_daemon(mount.kill_daemon())
    assert mount.status_of(image)["open_handles"] == 1
    path.unlink()
    wait_until(lambda: not mount.status()["images"], "the image to go")
    assert not counted_handles(mount).all()
    assert mount.stop() == 0


def counted_handles(mount: Mount) -> Handles:
    """Return the counts of a mount's handles, as holder and daemon share them."""
    (table,) = (fd for fd, target in files_of(mount.holder_pid) if "lazyimg-handles" in target)
    with opened(Path(table), os.O_RDWR) as fd:
        return Handles(fd)


def deleted_files_of(pid: int) -> list[str]:
    return [target for _, target in files_of(pid) if target.endswith("/a (deleted)")]


def files_of(pid: int) -> list[tuple[str, str]]:
    """Return, of each descriptor of a process, its path below /proc and what it is of."""
    return [(str(fd), os.readlink(fd)) for fd in Path(f"/proc/{pid}/fd").iterdir()]


@needs_resend
def test_holder_daemon_and_holder_killed_in_turn(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] Whoever is killed, the other starts it anew: reads and open files go on, and nothing is left at the end.

    holder killed   daemon killed, reads waiting   holder killed   umount: no process, no mount, no socket is left
    """
    glance = make_glance()
    image = glance.add(16 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    with opened(mount.path / "gone", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"content")
        (mount.path / "gone").unlink()
        holder_pid = mount.holder_pid
        mount.kill_holder()
        holder_pid = new_holder(mount, holder_pid)
        assert os.pread(fd, 100, 0) == b"content"
        glance.fail(FaultRule("stall", seconds=600))
        reads = {start: mount.read_later(image, start, STEP) for start in range(2 * MIB, 10 * MIB, MIB)}
        wait_until(lambda: mount.status_of(image).get("waiting_chunks", 0) >= len(reads), "waiting reads")
        old_pid = mount.kill_daemon()
        glance.fail()
        for start, read in reads.items():
            assert read.result(60) == image.content[start : start + STEP]
        mount.new_daemon(old_pid)
        assert mount.status()["holder_pid"] == holder_pid
        assert os.pread(fd, 100, 0) == b"content"
        os.kill(holder_pid, signal.SIGKILL)
        new_holder(mount, holder_pid)
        mount.restart()
        assert os.pread(fd, 100, 0) == b"content"
    assert lazyimg("umount", mount.path).returncode == 0
    wait_until(lambda: not mount.processes(), "the end of holder and daemon")
    assert not is_mounted(mount.path)
    assert not mount.control.exists()


@needs_resend
def test_daemon_killed_as_soon_as_there_is_another_holder(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] Another holder has the descriptors of all open files from its first instant: the daemon may die then."""
    mount = make_mount(glance)
    with contextlib.ExitStack() as stack:
        fds = []
        for number in range(40):
            path = mount.path / f"gone{number}"
            fds.append(stack.enter_context(opened(path, os.O_RDWR | os.O_CREAT)))
            os.write(fds[-1], str(number).encode())
            path.unlink()
        daemon_pid, holder_pid = mount.status()["daemon_pid"], mount.holder_pid
        mount.kill_holder()
        wait_until(lambda: mount.status()["holder_pid"] != holder_pid, "another holder")
        os.kill(daemon_pid, signal.SIGKILL)
        for number, fd in enumerate(fds):
            assert os.pread(fd, 100, 0) == str(number).encode()


def test_holder_that_has_taken_up_is_replaced_at_once(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] However often holders die: without one, the daemon's own death would be the end of the mount."""
    mount = make_mount(glance)
    holder_pid = mount.holder_pid
    for count in range(1, 5):
        os.kill(holder_pid, signal.SIGKILL)
        wait_until(lambda old=holder_pid: mount.status()["holder_pid"] != old, "another holder")  # type: ignore[misc]
        holder_pid = mount.status()["holder_pid"]
        # It passes this on once it has taken up.
        os.kill(holder_pid, signal.SIGUSR1)
        wait_until(lambda count=count: mount.log().count("dump of daemon") == count, "the dump")  # type: ignore[misc]
    assert mount.log().count("starting another in 0.0 s") == 4
    os.kill(holder_pid, signal.SIGTERM)
    wait_until(lambda: not is_mounted(mount.path), "the end")


def test_sigterm_to_the_next_holder_unmounts(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """SIGTERM to a holder that the daemon started unmounts and ends both, as with the first."""
    mount = make_mount(glance)
    mount.kill_holder()
    os.kill(new_holder(mount, mount.holder_pid), signal.SIGTERM)
    wait_until(lambda: not mount.processes(), "the end of holder and daemon")
    assert not is_mounted(mount.path)


def new_holder(mount: Mount, old_pid: int) -> int:
    """Return the pid of the holder that the daemon started."""

    def other_pid() -> int:
        pid: int = mount.status()["holder_pid"]
        return 0 if pid == old_pid or not is_running(pid) else pid

    return wait_until(other_pid, "another holder")
