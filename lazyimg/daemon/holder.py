"""The small process that keeps /dev/fuse: it mounts, starts the daemon as its child, and replaces it when it dies.

It holds what a daemon needs to go on where the last one stopped: the FUSE descriptor, the kernel's INIT request
and the upper folder.  It knows neither Glance nor the cache, and never touches a path under the mount (I11).

    mount ──► answer INIT ──► daemon starts ──READY──► serves ──exit 0──► unmounted: end
                                 ▲    │ dies before READY     │ dies
                                 │    ▼ the first time: end   │
                                 └── pause ◄──────────────────┘
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazyimg.config import Config
from lazyimg.daemon import handshake, mountpoint
from lazyimg.daemon.notify import NOTIFY_BYTES_MAX, notify, open_listener
from lazyimg.errors import LazyImgError

logger = logging.getLogger(__name__)

# sd_listen_fds(3): descriptors handed to a process begin here.
LISTEN_FDS_START = 3
# Pauses between daemons that die before they are ready; one that was ready is replaced at once.
RESTART_PAUSE_MIN_S = 0.1
RESTART_PAUSE_MAX_S = 5.0


@dataclass(frozen=True, slots=True)
class Handover:
    """What a daemon starts from, in a memory file beside the descriptors."""

    config: Config
    mountpoint: Path
    init_request: bytes
    is_resumed: bool

    def to_json(self) -> str:
        return json.dumps(
            {
                "config": self.config.model_dump(mode="json"),
                "mountpoint": str(self.mountpoint),
                "init_request": self.init_request.hex(),
                "is_resumed": self.is_resumed,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Handover:
        values = json.loads(text)
        return cls(
            Config(**values["config"]),
            Path(values["mountpoint"]),
            bytes.fromhex(values["init_request"]),
            bool(values["is_resumed"]),
        )


def run_mount(config: Config, where: Path) -> int:
    """Mount at `where` and serve until it is unmounted; return the exit code.

    Raises InUse or MountFailed, with nothing left mounted.
    """
    where = Path(os.path.abspath(where))
    mountpoint.check_mountpoint(where)
    upper_fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fuse_fd = mountpoint.mount(where, allow_other=config.allow_other)
    try:
        init_request = handshake.open_session(fuse_fd)
        _raise_read_ahead(where, config.read_ahead)
        return _Holder(config, where, fuse_fd, upper_fd, init_request).run()
    finally:
        # Closing the last descriptor aborts what is left of the connection; a mount still there is dead then.
        os.close(fuse_fd)
        os.close(upper_fd)
        if mountpoint.mounted_type(where) == mountpoint.FILE_SYSTEM_TYPE:
            with contextlib.suppress(LazyImgError):
                mountpoint.detach(where)


class _Holder:
    """The loop around the daemon."""

    def __init__(self, config: Config, where: Path, fuse_fd: int, upper_fd: int, init_request: bytes) -> None:
        self._config = config
        self._where = where
        self._fds = {"fuse": fuse_fd, "upper": upper_fd}
        self._init_request = init_request
        self._is_ready = False
        self._child = 0

    def run(self) -> int:
        """Keep a daemon running until one ends well, or the first one does not become ready."""
        pause_s = 0.0
        was_ever_ready = False
        with _signals_as_bytes() as signals:
            while True:
                status = self._run_daemon(signals, is_resumed=was_ever_ready)
                was_ever_ready |= self._is_ready
                code = os.waitstatus_to_exitcode(status)
                if code == 0 or not was_ever_ready or handshake.is_gone(self._fds["fuse"]):
                    return code if code >= 0 else 128 - code
                if self._is_ready:
                    pause_s = 0.0
                logger.error(
                    "daemon %d ended with %d; starting another in %.1f s", self._child, code, pause_s
                )
                if select.select([signals], [], [], pause_s)[0] and not self._is_ready:
                    # Daemons that do not even start cannot be asked to unmount.
                    signals.recv(64)
                    self._unmount()
                pause_s = min(max(RESTART_PAUSE_MIN_S, pause_s * 2), RESTART_PAUSE_MAX_S)

    def _unmount(self) -> None:
        try:
            mountpoint.umount(self._where)
        except LazyImgError as exc:
            logger.error("%s", exc)

    def _run_daemon(self, signals: socket.socket, *, is_resumed: bool) -> int:
        """Start a daemon, pass signals and notifications on, and return its wait status."""
        self._is_ready = False
        listener, address = open_listener()
        with listener:
            self._child = self._spawn(address, is_resumed=is_resumed)
            pid_fd = os.pidfd_open(self._child)
            try:
                while True:
                    readable, _, _ = select.select([pid_fd, listener.fileno(), signals.fileno()], [], [])
                    if listener.fileno() in readable:
                        self._notified(listener.recv(NOTIFY_BYTES_MAX).decode(errors="replace"))
                    elif signals.fileno() in readable:
                        for number in signals.recv(64):
                            os.kill(self._child, number)
                    else:
                        return os.waitpid(self._child, 0)[1]
            finally:
                os.close(pid_fd)

    def _notified(self, message: str) -> None:
        if "READY=1" in message.splitlines():
            self._is_ready = True
        # The service's main process is this one, whichever daemon speaks.
        notify(message)

    def _spawn(self, notify_address: str, *, is_resumed: bool) -> int:
        handover = Handover(self._config, self._where, self._init_request, is_resumed)
        with os.fdopen(os.memfd_create("lazyimg-handover"), "w+b") as memory:
            memory.write(handover.to_json().encode())
            memory.flush()
            fds = {**self._fds, "handover": memory.fileno()}
            # Above where they are wanted, so that no dup2 overwrites one that is still to come.
            moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LISTEN_FDS_START + 64) for fd in fds.values()]
            try:
                return os.posix_spawn(
                    sys.executable,
                    [sys.executable, "-m", "lazyimg.daemon.service"],
                    {
                        **os.environ,
                        "NOTIFY_SOCKET": notify_address,
                        "LISTEN_FDS": str(len(fds)),
                        "LISTEN_FDNAMES": ":".join(fds),
                    },
                    file_actions=[
                        (os.POSIX_SPAWN_DUP2, fd, LISTEN_FDS_START + i) for i, fd in enumerate(moved)
                    ],
                    setsigdef=[signal.SIGINT, signal.SIGTERM],
                )
            finally:
                for fd in moved:
                    os.close(fd)


@contextlib.contextmanager
def _signals_as_bytes() -> Iterator[socket.socket]:
    """Catch SIGTERM, and SIGINT where a terminal has not sent it to the daemon too; give their numbers as bytes."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _noted) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with ours, theirs:
            yield ours
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _noted(_number: int, _frame: object) -> None:
    """The wakeup descriptor has it already."""


def _raise_read_ahead(where: Path, size_bytes: int) -> None:
    """Let buffered reads of this mount be large; without it the kernel sends 128 KiB at a time."""
    device = mountpoint.device_of(where)
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(size_bytes >> 10))
    except OSError as exc:
        logger.info("read-ahead of %s stays as it is: %s", where, exc)
