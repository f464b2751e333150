"""`lazyimg mount` as a user runs it, on a real /dev/fuse, and ended whatever a test did to it.

A daemon that hangs would hang the reader, and a reader in the test process the whole session: `Mounts.end_all`
ends every daemon, upon which the kernel fails what still waits.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from served_glance import ServedImage

from lazyimg.control import ControlClient
from lazyimg.errors import DaemonUnreachable

T = TypeVar("T")
LAZYIMG = str(Path(sys.executable).with_name("lazyimg"))
# Generous: the machine may be doing much else.
READY_TIMEOUT_S = 60
END_TIMEOUT_S = 30
POLL_PAUSE_S = 0.02
FUSE_TYPE = "fuse.lazyimg"


def wait_until(condition: Callable[[], T], what: str, timeout_s: float = READY_TIMEOUT_S) -> T:
    """Return the first true value of `condition`, or fail naming `what`."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(POLL_PAUSE_S)
    return value


def lazyimg(*words: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a lazyimg command to its end."""
    command = [LAZYIMG, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)


def is_mounted(path: Path) -> bool:
    """True if anything is mounted exactly there, by /proc and not by asking the mount."""
    fields = (line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return any(one[4] == str(path) for one in fields)


def is_running(pid: int) -> bool:
    """True for a process that has not ended; one that nobody has waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """Return the processes a process has started and not waited for."""
    found = []
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in tasks.read_text().split()]
    return found


class Mount:
    """One mountpoint with its cache, socket and log below `folder`; started again as often as a test likes."""

    def __init__(
        self,
        folder: Path,
        endpoint: str,
        config: Mapping[str, object],
        cache_dir: Path | None,
        prefix: Sequence[str] = (),
        control: Path | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / "_base"
        self.path.mkdir(exist_ok=True)
        self.cache_dir = cache_dir or folder / "cache"
        self.control = control or folder / "c.sock"
        self.log_path = folder / "log"
        # A read that hangs shall fail the test, not the session; and the disk the tests run on may be full.
        # Most tests count requests; what is fetched for nobody, or asked for twice, has tests of its own.
        defaults = {"read_timeout": 60, "cache_free_min": 0, "hydrate": False, "hedge": False}
        self.config: dict[str, object] = {**defaults, **config}
        self._endpoint = endpoint
        # What runs `lazyimg mount`, with fewer rights for one.
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._readers = ThreadPoolExecutor(32, thread_name_prefix="reader")

    # ── life ──

    def start(self) -> None:
        """Mount, and return when status answers."""
        self.launch()
        wait_until(self.is_ready, f"lazyimg mount; its log is {self.log_path}")

    def launch(
        self,
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """Run `lazyimg mount`, through the command `prefix` if given, and wait for nothing."""
        assert self._process is None or self._process.poll() is not None
        keys = {f"LAZYIMG_{key.upper()}": str(value) for key, value in self.config.items()}
        command = [*prefix, *self._prefix, LAZYIMG, "mount", self.path]
        for endpoint in self._endpoint.split():
            command += ["--endpoint", endpoint]
        command += ["--cache-dir", self.cache_dir, "--control", self.control]
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                list(map(str, command)),
                env={**os.environ, **keys, **(environ or {})},
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                pass_fds=pass_fds,
            )
        return self._process

    def is_ready(self) -> bool:
        """True when status answers; fails if `lazyimg mount` has ended."""
        assert self._process is not None
        assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{self.log()}"
        try:
            self.status()
        except DaemonUnreachable:
            return False
        return True

    def stop(self) -> int:
        """SIGTERM, as systemd does; return the exit code."""
        self.begin_stop()
        return self.wait_ended()

    def begin_stop(self) -> None:
        """SIGTERM, and wait for nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait_ended(self) -> int:
        """Return the exit code of `lazyimg mount`."""
        assert self._process is not None
        try:
            return self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # What they hang on is in the log then.
            self._process.send_signal(signal.SIGUSR1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
            raise AssertionError(f"`lazyimg mount` goes on:\n{self.log()[-20_000:]}") from None

    def kill_holder(self) -> None:
        """SIGKILL the holder, not its daemon."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(END_TIMEOUT_S)

    def kill_daemon(self) -> int:
        """SIGKILL the daemon, not its holder; return the pid it had."""
        pid: int = self.status()["daemon_pid"]
        os.kill(pid, signal.SIGKILL)
        return pid

    def new_daemon(self, old_pid: int) -> int:
        """Return the pid of the daemon that replaced `old_pid`, once it answers."""

        def other_pid() -> int:
            with contextlib.suppress(DaemonUnreachable):
                pid: int = self.status()["daemon_pid"]
                return 0 if pid == old_pid else pid
            return 0

        return wait_until(other_pid, "another daemon")

    def restart(self) -> None:
        """`lazyimg restart`, which must do it."""
        result = lazyimg("restart", "--control", self.control)
        assert result.returncode == 0, result.stderr + self.log()

    def kill_everything(self) -> None:
        """SIGKILL holder and daemon at once."""
        assert self._process is not None
        # Stopped first: each of them would start the other anew.
        stopped: set[int] = set()
        while more := self.processes() - stopped:
            _signal_all(more, signal.SIGSTOP)
            stopped |= more
        _signal_all(stopped, signal.SIGKILL)
        self._process.wait(END_TIMEOUT_S)
        wait_until(lambda: not any(map(is_running, stopped)), f"the end of {stopped}")

    def processes(self) -> set[int]:
        """Return holder, daemon, and whatever else they started: all write to the log."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "fd" / "2") == str(self.log_path) and is_running(int(folder.name)):
                    found.add(int(folder.name))
        return found

    def end(self) -> None:
        """Detach the mount and end the processes, whatever state they are in."""
        while is_mounted(self.path):
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=True)
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)
            self.kill_everything()
        self._readers.shutdown()

    @property
    def holder_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # ── what it says and shows ──

    def log(self) -> str:
        return self.log_path.read_text()

    def client(self) -> ControlClient:
        return ControlClient(self.control)

    def status(self) -> dict[str, Any]:
        return self.client().status()

    def status_of(self, image: ServedImage) -> dict[str, Any]:
        """Return the image's entry in the status."""
        return next(one for one in self.status()["images"] if one["id"] == image.id)

    def path_of(self, image: ServedImage) -> Path:
        return self.path / image.base_name

    def fetch_all(self, image: ServedImage) -> None:
        """Return when the whole image is in the cache."""
        for _ in self.client().prefetch(image.id):
            pass

    def read_later(self, image: ServedImage, start: int, size_bytes: int) -> Future[bytes]:
        """Read a range in a thread."""
        return self._readers.submit(read_direct, self.path_of(image), start, size_bytes)


def _signal_all(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def lookup(path: Path) -> str:
    """Return what a lookup of a path says: that it is there, is not, or is not decided."""
    try:
        path.stat()
    except BlockingIOError:
        return "EAGAIN"
    except FileNotFoundError:
        return "ENOENT"
    return "found"


def read_direct(path: Path, start: int, size_bytes: int) -> bytes:
    """Read past the page cache, as qemu does with cache=none."""
    buffer = mmap.mmap(-1, size_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        read = os.preadv(descriptor, [buffer], start)
    finally:
        os.close(descriptor)
    with buffer:
        return buffer[:read]


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Give a descriptor of a file for the block."""
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


class Mounts:
    """Every mount of a test, for one end of all of them."""

    def __init__(self) -> None:
        self._mounts: list[Mount] = []

    def make(
        self,
        folder: Path,
        endpoint: str,
        *,
        cache_dir: Path | None = None,
        start: bool = True,
        prefix: Sequence[str] = (),
        control: Path | None = None,
        **config: object,
    ) -> Mount:
        """Mount `folder`/_base with these configuration keys."""
        mount = Mount(folder, endpoint, config, cache_dir, prefix, control)
        self._mounts.append(mount)
        if start:
            mount.start()
        return mount

    def end_all(self) -> None:
        """End every mount, the last one first."""
        with contextlib.ExitStack() as stack:
            for mount in self._mounts:
                stack.callback(mount.end)
            self._mounts.clear()


@contextlib.contextmanager
def mounts() -> Iterator[Mounts]:
    """Give mounts inside the block; after it none is left."""
    made = Mounts()
    try:
        yield made
    finally:
        made.end_all()
