"""`lazyimg mount` under systemd, whose part a test plays: it keeps descriptors and starts the unit again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, is_mounted, is_running, lazyimg, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.daemon.notify import close_all, receive
from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

# sd_listen_fds(3): from 3 on, and only for the process of this pid.  Arguments: how many, their numbers, a command.
LISTEN = """
import fcntl, os, sys
count = int(sys.argv[1])
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 1000) for fd in sys.argv[2 : 2 + count]]
for i, fd in enumerate(fds):
    os.dup2(fd, 3 + i)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2 + count], sys.argv[2 + count :])
"""


# A guest is a process of its own: one that has files of a mount without a daemon open can start no other.
GUEST = """
import hashlib, os, sys
image, file = sys.argv[1:]
gone = os.open(file, os.O_RDWR | os.O_CREAT)
os.write(gone, b"content")
os.unlink(file)
fd = os.open(image, os.O_RDONLY)
print("open", flush=True)
print(hashlib.sha256(os.pread(fd, 1 << 20, 2 << 20)).hexdigest(), os.pread(gone, 100, 0).decode())
"""


class Manager:
    """systemd as far as a unit with FileDescriptorStoreMax= sees it."""

    def __init__(self, mount: Mount) -> None:
        self._mount = mount
        self._address = str(mount.folder / "notify")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._listener.bind(self._address)
        # In the order in which they came; systemd keeps several of one name, but not the same file under it twice.
        self.store: list[tuple[str, int]] = []
        self.ready_count = 0
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def start(self) -> None:
        """Start the unit with what is kept, and return when it says that it is ready."""
        count = self.ready_count
        fds = [fd for _, fd in self.store]
        names = ":".join(name for name, _ in self.store)
        environ = {"NOTIFY_SOCKET": self._address, "LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": names}
        prefix = [sys.executable, "-c", LISTEN, str(len(fds)), *map(str, fds)]
        self._mount.launch(prefix, environ, fds)
        wait_until(lambda: self.ready_count > count, f"READY=1; the log is {self._mount.log_path}")

    def names(self) -> set[str]:
        return {name.partition("-")[0] for name, _ in self.store}

    def lose_last(self) -> None:
        """Forget what was stored last."""
        close_all([self.store.pop()[1]])

    def end(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"END=1", self._address)
        self._thread.join()
        self._listener.close()
        close_all([fd for _, fd in self.store])

    def _listen(self) -> None:
        while (message := receive(self._listener)) is not None and "END" not in message[0]:
            variables, fds = message
            name = variables.get("FDNAME", "stored")
            if "FDSTORE" in variables:
                for fd in fds:
                    self._keep(name, fd)
                continue
            close_all(fds)
            if "FDSTOREREMOVE" in variables:
                close_all([fd for known, fd in self.store if known == name])
                self.store = [one for one in self.store if one[0] != name]
            self.ready_count += variables.get("READY") == "1"

    def _keep(self, name: str, fd: int) -> None:
        if any(known == name and os.path.sameopenfile(fd, kept) for known, kept in self.store):
            os.close(fd)
        else:
            self.store.append((name, fd))


@contextlib.contextmanager
def ending(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process that the block did not wait for."""
    try:
        yield
    finally:
        process.kill()


@pytest.fixture
def managed(make_mount: Callable[..., Mount], glance: ServedGlance) -> Iterator[tuple[Manager, Mount]]:
    mount = make_mount(glance, start=False)
    manager = Manager(mount)
    manager.start()
    yield manager, mount
    manager.end()


@needs_resend
def test_mount_outlives_holder_and_daemon(managed: tuple[Manager, Mount], glance: ServedGlance) -> None:
    """[I9] Both killed at once, and started again with what systemd kept: reads that waited, and open files, go on."""
    manager, mount = managed
    image = glance.add(8 * MIB)
    mount.path_of(image).stat()
    glance.fail(FaultRule("stall", seconds=600))
    command = [sys.executable, "-c", GUEST, str(mount.path_of(image)), str(mount.path / "gone")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guest, ending(guest):
        assert guest.stdout is not None
        assert guest.stdout.readline() == "open\n"
        wait_until(lambda: mount.status_of(image).get("waiting_chunks", 0) > 0, "the waiting read")
        assert manager.names() == {"fuse", "upper", "handles", "handover"}
        mount.kill_everything()
        glance.fail()
        manager.start()
        digest = hashlib.sha256(image.content[2 * MIB : 3 * MIB]).hexdigest()
        assert guest.stdout.read() == f"{digest} content\n"
    wait_until(lambda: len(manager.store) == 4, "the end of what was stored for the closed file")
    assert mount.stop() == 0
    assert not is_mounted(mount.path)


def test_next_holder_of_systemd_takes_over(managed: tuple[Manager, Mount]) -> None:
    """[I9] Only the holder killed: the one that systemd starts takes over from the daemon and its next holder."""
    manager, mount = managed
    fd = os.open(mount.path / "gone", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"content")
    (mount.path / "gone").unlink()
    old_daemon, old_holder = mount.status()["daemon_pid"], mount.holder_pid
    mount.kill_holder()
    wait_until(lambda: mount.status()["holder_pid"] != old_holder, "the daemon's own next holder")
    manager.start()
    mount.new_daemon(old_daemon)
    assert mount.status()["holder_pid"] == mount.holder_pid
    assert os.pread(fd, 100, 0) == b"content"
    wait_until(lambda: len(mount.processes()) == 2, "the end of the daemon of before and its holder")
    os.close(fd)
    assert not is_running(old_daemon)
    assert mount.stop() == 0
    assert not is_mounted(mount.path)


def test_file_opened_without_a_holder_is_kept(managed: tuple[Manager, Mount]) -> None:
    """[I9] What no holder was there to pass on is with systemd as soon as the next one is there, and once."""
    manager, mount = managed
    with (mount.path / "a").open("w"), (mount.path / "b").open("w"):
        wait_until(lambda: len(manager.store) == 6, "what was opened")
        # As if nobody had been there for the second.
        manager.lose_last()
        old_holder = mount.holder_pid
        mount.kill_holder()
        wait_until(lambda: mount.status()["holder_pid"] != old_holder, "the next holder")
        wait_until(lambda: len(manager.store) == 6, "what was lost")
        assert len({name for name, _ in manager.store}) == 6
    wait_until(lambda: len(manager.store) == 4, "the end of what was stored for the closed files")


def test_descriptors_of_a_mount_that_ended_are_given_up(managed: tuple[Manager, Mount]) -> None:
    """After `lazyimg umount` the next start mounts anew, and what systemd had kept is removed there."""
    manager, mount = managed
    assert lazyimg("umount", mount.path).returncode == 0
    assert mount.wait_ended() == 0
    manager.start()
    assert is_mounted(mount.path)
    assert mount.is_ready()
    assert sorted(name for name, _ in manager.store) == ["fuse", "handles", "handover", "upper"]
    assert mount.stop() == 0


def test_descriptors_for_another_process_are_not_taken(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """$LISTEN_FDS that a parent forgot in the environment is for the process of $LISTEN_PID, and nobody else."""
    mount = make_mount(glance, start=False)
    mount.launch(environ={"LISTEN_FDS": "2", "LISTEN_FDNAMES": "fuse:upper", "LISTEN_PID": "1"})
    wait_until(mount.is_ready, "lazyimg mount")
    os.kill(mount.holder_pid, signal.SIGTERM)
    assert mount.wait_ended() == 0
