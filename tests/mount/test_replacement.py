"""The daemon dies and is replaced, or cannot start, or is told to end: what a guest and an operator see."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, children_of, is_mounted, is_running, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow


def new_daemon(mount: Mount, old_pid: int) -> int:
    """Return the pid of the daemon that replaced `old_pid`, once it answers."""

    def other_pid() -> int:
        pid: int = mount.status()["daemon_pid"] if mount.is_ready() else old_pid
        return 0 if pid == old_pid else pid

    return wait_until(other_pid, "another daemon")


@needs_resend
def test_killed_daemon_fails_no_read(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] SIGKILL of the daemon with 24 reads waiting: another takes over, and all end with the image's bytes."""
    glance = make_glance()
    image = glance.add(64 * MIB)
    mount = make_mount(glance)
    path = mount.path_of(image)
    path.stat()
    glance.fail(FaultRule("stall", seconds=600))
    starts = range(2 * MIB, 50 * MIB, 2 * MIB)
    reads = {start: mount.read_later(image, start, 128 << 10) for start in starts}
    wait_until(lambda: mount.status_of(image).get("waiting_chunks", 0) >= 2 * len(starts), "waiting reads")
    old_pid = mount.kill_daemon()
    glance.fail()
    for start, read in reads.items():
        assert read.result(60) == image.content[start : start + (128 << 10)]
    assert new_daemon(mount, old_pid) != old_pid
    assert not is_running(old_pid)


@needs_resend
def test_daemon_killed_again_and_again_under_readers(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] Three daemons killed while eight readers go through an image: each reads exactly the image."""
    glance = make_glance()
    image = glance.add(48 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    step = 96 << 10
    reads = [
        mount.read_later(image, start, step) for start in range(0, len(image.content) - step, step)
    ]  # in the pool's 32 threads
    for count in (60, 120, 200):
        wait_until(lambda count=count: sum(read.done() for read in reads) >= count, f"{count} reads")  # type: ignore[misc]
        new_daemon(mount, mount.kill_daemon())
    for number, read in enumerate(reads):
        assert read.result(60) == image.content[number * step : number * step + step]


@needs_resend
def test_open_file_outlives_the_daemon(
    mountable: None, make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] A file opened under one daemon is read, and counted as open, under the next; its image is not dropped."""
    image = glance.add(3 * MIB)
    mount = make_mount(glance)
    with mount.path_of(image).open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 4096, 0) == image.content[:4096]
        new_daemon(mount, mount.kill_daemon())
        assert os.pread(file.fileno(), MIB, 2 * MIB) == image.content[2 * MIB :]
        result = lazyimg("evict", image.id, "--control", mount.control)
        assert result.returncode == 6, result.stderr
        assert os.pread(file.fileno(), MIB, MIB) == image.content[MIB : 2 * MIB]


def test_daemon_that_cannot_start_is_one_line_and_leaves_nothing(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """A first daemon that refuses to start is not replaced: its exit code, one line, and nothing mounted."""
    mount = make_mount(glance, start=False)
    mount.cache_dir.mkdir(mode=0o700)
    (mount.cache_dir / "version").write_text("99\n")
    process = mount.launch()
    assert mount.wait_ended() == 9
    assert len([line for line in mount.log().splitlines() if line.startswith("lazyimg: ")]) == 1
    assert "Traceback" not in mount.log()
    assert not is_mounted(mount.path)
    assert not children_of(process.pid)


def test_sigterm_unmounts(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """SIGTERM to `lazyimg mount` unmounts, ends daemon and holder, and is exit code 0."""
    mount = make_mount(glance)
    pid = mount.status()["daemon_pid"]
    assert mount.stop() == 0
    assert not is_mounted(mount.path)
    assert not is_running(pid)
    assert not mount.control.exists()


def test_sigterm_to_a_daemon_that_dies_is_not_lost(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """A holder that passes SIGTERM on to a daemon that was killed the moment before unmounts all the same."""
    mount = make_mount(glance)
    # Both at once, as far as the holder can see.
    os.kill(mount.holder_pid, signal.SIGSTOP)
    mount.kill_daemon()
    os.kill(mount.holder_pid, signal.SIGTERM)
    os.kill(mount.holder_pid, signal.SIGCONT)
    assert mount.wait_ended() == 0
    assert not is_mounted(mount.path)


def test_ctrl_c_unmounts(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """SIGINT to holder and daemon, as a terminal sends it, ends both with exit code 0."""
    mount = make_mount(glance)
    for pid in (mount.status()["daemon_pid"], mount.holder_pid):
        os.kill(pid, signal.SIGINT)
    assert mount.wait_ended() == 0
    assert not is_mounted(mount.path)
    assert "Traceback" not in mount.log()


def test_sigterm_while_busy_goes_on_serving(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """SIGTERM while a file is open is refused: the log names who holds what, and reads go on."""
    image = glance.add(2 * MIB)
    mount = make_mount(glance)
    with mount.path_of(image).open("rb", buffering=0) as file:
        os.kill(mount.holder_pid, signal.SIGTERM)
        wait_until(lambda: "still serving" in mount.log(), "the refusal in the log", 20)
        line = next(one for one in mount.log().splitlines() if "still serving" in one)
        assert f"pid {os.getpid()}" in line
        assert image.base_name in line
        assert file.read() == image.content
    assert mount.stop() == 0


def test_restart_without_glance_serves_what_is_here(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I6] A mount that starts while Glance is away has its known names and present bytes, at once."""
    glance = make_glance()
    image = glance.add(4 * MIB)
    mount = make_mount(glance, lookup_timeout=1)
    mount.path_of(image).read_bytes()
    mount.fetch_all(image)
    assert mount.stop() == 0
    glance.stop()
    mount.start()
    start = time.monotonic()
    assert image.base_name in os.listdir(mount.path)
    assert mount.path_of(image).read_bytes() == image.content
    assert os.readlink(mount.path / image.id) == image.base_name
    with pytest.raises(BlockingIOError):
        (mount.path / ("a" * 40)).stat()
    assert time.monotonic() - start < 20


def test_dead_mount_is_replaced(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """[I9] After SIGKILL of holder and daemon, the next `lazyimg mount` detaches the dead mount and serves."""
    image = glance.add(2 * MIB)
    mount = make_mount(glance)
    assert mount.path_of(image).read_bytes() == image.content
    mount.kill_everything()
    assert is_mounted(mount.path)
    mount.start()
    assert mount.path_of(image).read_bytes() == image.content
    assert mount.stop() == 0
    assert not is_mounted(mount.path)


def test_daemon_goes_on_without_its_holder(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """A holder that dies takes nobody along: reads go on, and a second mount there is refused."""
    image = glance.add(4 * MIB)
    mount = make_mount(glance)
    path = mount.path_of(image)
    assert read_direct(path, 0, MIB) == image.content[:MIB]
    daemon_pid = mount.status()["daemon_pid"]
    mount.kill_holder()
    assert read_direct(path, 2 * MIB, MIB) == image.content[2 * MIB : 3 * MIB]
    result = lazyimg("mount", mount.path, "--endpoint", glance.url, "--cache-dir", mount.folder / "other")
    assert result.returncode == 6
    assert "mounted there" in result.stderr
    assert lazyimg("umount", mount.path).returncode == 0
    wait_until(lambda: not is_running(daemon_pid), "the daemon's end", 20)


def test_upper_file_opened_before_is_read_after(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] An open file of the upper folder, in a subfolder too, is read on under the next daemon."""
    mount = make_mount(glance, start=False)
    (mount.path / "folder").mkdir()
    content = os.urandom(300_000)
    (mount.path / "folder" / "file").write_bytes(content)
    mount.start()
    with (mount.path / "folder" / "file").open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 1000, 0) == content[:1000]
        new_daemon(mount, mount.kill_daemon())
        assert os.pread(file.fileno(), 300_000, 1000) == content[1000:]


def test_holder_whose_daemons_cannot_start_any_more_can_be_stopped(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """SIGTERM unmounts also while no daemon comes up, and the holder ends instead of trying for ever."""
    mount = make_mount(glance)
    # Of a later version of this program; what the disk does is waited for by a daemon that does without.
    (mount.cache_dir / "version").write_text("99\n")
    mount.kill_daemon()
    wait_until(lambda: "starting another in 0.2 s" in mount.log(), "daemons that fail again and again")
    os.kill(mount.holder_pid, signal.SIGTERM)
    mount.wait_ended()
    assert not is_mounted(mount.path)
