"""`lazyimg restart` under running guests: one daemon gives the mount to the next on purpose, or keeps it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, is_running, lazyimg, opened, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

STEP = 96 << 10


class Load:
    """Eight readers that check what they read of two images, one of them absent, and a writer that checks its file."""

    def __init__(self, mount: Mount, images: list[ServedImage]) -> None:
        self.failures: list[str] = []
        self.count = 0
        self._is_ending = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run, args=(self._read, mount.path_of(images[n % 2]), images[n % 2], n)
            )
            for n in range(8)
        ]
        self._threads.append(
            threading.Thread(target=self._run, args=(self._write, mount.path / "written", None, 9))
        )

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._is_ending.set()
        for thread in self._threads:
            thread.join()

    def _run(self, work: Callable[..., None], path: Path, image: ServedImage | None, number: int) -> None:
        try:
            step = 0
            while not self._is_ending.is_set():
                work(path, image, number * 1000 + step)
                step += 1
                self.count += 1
        except Exception as exc:
            self.failures.append(f"{work.__name__} {step}: {exc!r}")

    def _read(self, path: Path, image: ServedImage, step: int) -> None:
        start = step * 7 * 4096 % (len(image.content) - STEP)
        start -= start % 4096
        assert read_direct(path, start, STEP) == image.content[start : start + STEP], (
            f"wrong bytes at {start}"
        )

    def _write(self, path: Path, _image: None, step: int) -> None:
        with opened(path, os.O_RDWR | os.O_CREAT) as fd:
            data = os.urandom(50_000)
            assert os.pwrite(fd, data, step * 10) == len(data)
            assert os.pread(fd, len(data), step * 10) == data


def test_restart_under_readers_and_a_writer(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] Five planned restarts under eight readers and a writer, an unlinked file open: nothing fails."""
    glance = make_glance()
    present, absent = glance.add(8 * MIB), glance.add(64 * MIB)
    mount = make_mount(glance)
    mount.path_of(absent).stat()
    mount.fetch_all(present)
    pids = {mount.status()["daemon_pid"]}
    with opened(mount.path / "gone", os.O_RDWR | os.O_CREAT) as fd, Load(mount, [present, absent]) as load:
        os.write(fd, b"content")
        (mount.path / "gone").unlink()
        for _ in range(5):
            before = load.count
            mount.restart()
            wait_until(lambda before=before: load.count > before + 10, "readers that go on")  # type: ignore[misc]
            pids.add(mount.status()["daemon_pid"])
        assert os.pread(fd, 100, 0) == b"content"
    assert load.failures == []
    assert len(pids) == 6
    assert sum(is_running(pid) for pid in pids) == 1
    assert mount.stop() == 0


@needs_resend
def test_restart_does_not_wait_for_glance(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] Reads that wait for Glance hinder no restart, and end with the image's bytes in the next daemon."""
    glance = make_glance()
    image = glance.add(16 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    glance.fail(FaultRule("stall", seconds=600))
    reads = {start: mount.read_later(image, start, STEP) for start in range(2 * MIB, 10 * MIB, MIB)}
    wait_until(lambda: mount.status_of(image).get("waiting_chunks", 0) >= len(reads), "waiting reads")
    old_pid = mount.status()["daemon_pid"]
    mount.restart()
    assert not is_running(old_pid)
    assert not any(read.done() for read in reads.values())
    glance.fail()
    for start, read in reads.items():
        assert read.result(60) == image.content[start : start + STEP]


def test_refused_restart_leaves_the_old_daemon(
    make_mount: Callable[..., Mount], glance: ServedGlance, tmp_path: Path
) -> None:
    """[I9] Another daemon that cannot take over ends, with exit code 11 and the reason; the old one serves on.

    config broken: refused   view changed: refused   no time: refused   all well: restarted with the config of now
    """
    image = glance.add(MIB)
    config = tmp_path / "lazyimg.toml"
    config.write_text("restart_timeout = 60\n")
    mount = make_mount(glance, config=config)
    pid = mount.status()["daemon_pid"]
    with opened(mount.path_of(image), os.O_RDONLY) as fd:
        for text, reason in (
            ("no_such_key = 1\n", "no_such_key"),
            ('view = "stored"\n', "'view' cannot change while mounted"),
        ):
            config.write_text(text)
            result = lazyimg("restart", "--control", mount.control)
            assert result.returncode == 11, result.stderr
            assert "the old daemon goes on" in result.stderr
            assert reason in result.stderr
            assert result.stderr.count("\n") == 1
            assert mount.status()["daemon_pid"] == pid
        assert os.pread(fd, 4096, 8192) == image.content[8192 : 8192 + 4096]
        config.write_text('restart_timeout = 0.01\nimage_mode = "0440"\n')
        mount.restart()
        assert os.fstat(fd).st_mode & 0o777 == 0o440
        pid = mount.status()["daemon_pid"]
        result = lazyimg("restart", "--control", mount.control)
        assert (result.returncode, "not ready within 0.01 s" in result.stderr) == (11, True), result.stderr
        assert mount.status()["daemon_pid"] == pid
        assert os.pread(fd, 4096, 0) == image.content[:4096]
    wait_until(lambda: len(mount.processes()) == 2, "the end of the refused daemons")
    assert mount.stop() == 0


def launch_changed(mount: Mount, folder: Path) -> Path:
    """Mount, and return a file which each daemon from then on runs before its own code."""
    folder.mkdir()
    mount.launch(environ={"PYTHONPATH": str(folder)})
    wait_until(mount.is_ready, "lazyimg mount")
    # site(1) of Python imports it.
    return folder / "sitecustomize.py"


def test_daemon_of_another_libfuse_is_refused(
    make_mount: Callable[..., Mount], glance: ServedGlance, tmp_path: Path
) -> None:
    """[I9] A daemon that would have answered the kernel's INIT otherwise takes nothing over."""
    image = glance.add(MIB)
    mount = make_mount(glance, start=False)
    changed = launch_changed(mount, tmp_path / "changed")
    pid = mount.status()["daemon_pid"]
    # The flags of fuse_init_out, behind the fuse_out_header and three words.
    changed.write_text(
        "import lazyimg.daemon.handshake as one\n"
        "own = one.libfuse_answer\n"
        "def other(request):\n"
        "    answer = bytearray(own(request))\n"
        "    answer[28] ^= 1\n"
        "    return bytes(answer)\n"
        "one.libfuse_answer = other\n"
    )
    result = lazyimg("restart", "--control", mount.control)
    assert (result.returncode, "this libfuse answers the kernel otherwise" in result.stderr) == (11, True), (
        result.stderr
    )
    assert mount.status()["daemon_pid"] == pid
    assert read_direct(mount.path_of(image), 0, 4096) == image.content[:4096]
    changed.unlink()
    mount.restart()
    assert mount.status()["daemon_pid"] != pid


def test_restart_on_a_kernel_that_cannot_send_again(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance], tmp_path: Path
) -> None:
    """[I9] Before Linux 6.9 the old daemon answers all that it took before it ends, or goes on.

    read waits for Glance   restart: refused, the old one goes on   restart, Glance answers: read and restart succeed
    """
    glance = make_glance()
    image = glance.add(16 * MIB)
    mount = make_mount(glance, start=False, restart_timeout=5, first_byte_timeout=1, retry_pause_max=0.2)
    changed = launch_changed(mount, tmp_path / "changed")
    changed.write_text("import lazyimg.daemon.handshake as one\none.Resumption.resend = lambda self: False\n")
    mount.path_of(image).stat()
    # By a daemon that can, to one that cannot.
    mount.restart()
    glance.fail(FaultRule("stall", seconds=600))
    read = mount.read_later(image, 8 * MIB, STEP)
    wait_until(lambda: mount.status_of(image).get("waiting_chunks", 0) > 0, "the waiting read")
    pid = mount.status()["daemon_pid"]
    result = lazyimg("restart", "--control", mount.control)
    assert (result.returncode, "this kernel cannot send them again" in result.stderr) == (11, True), (
        result.stderr
    )
    assert mount.status()["daemon_pid"] == pid
    assert not read.done()
    with ThreadPoolExecutor(1) as threads:
        restarted = threads.submit(mount.restart)
        wait_until(lambda: len(mount.processes()) == 3, "the other daemon")
        glance.fail()
        restarted.result(60)
    assert read.result(60) == image.content[8 * MIB : 8 * MIB + STEP]
    assert mount.status()["daemon_pid"] != pid
