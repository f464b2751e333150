"""Holder and daemon start each other: a module of ours, with descriptors by systemd's protocol (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping

# sd_listen_fds(3): descriptors handed to a process begin here.
LISTEN_FDS_START = 3
# What asks to unmount, and, with it, what asks for a dump.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SIGNALS = (*ENDING_SIGNALS, signal.SIGUSR1)
_VARIABLES = ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID")


def spawn(module: str, fds: Mapping[str, int], notify_address: str) -> int:
    """Start `module` with these descriptors and $NOTIFY_SOCKET ("": none); return its pid.

    SIGTERM, SIGINT and SIGUSR1 wait until it takes them (`take_signals`): until then they would kill it.
    """
    environ = {
        name: value for name, value in os.environ.items() if name not in (*_VARIABLES, "NOTIFY_SOCKET")
    }
    environ |= {"LISTEN_FDS": str(len(fds)), "LISTEN_FDNAMES": ":".join(fds)}
    if notify_address:
        environ["NOTIFY_SOCKET"] = notify_address
    # Above where they are wanted, so that no dup2 overwrites one that is still to come.
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, LISTEN_FDS_START + len(fds)) for fd in fds.values()]
    try:
        # The interpreter and the package as they are on disk now, which may be a later version's.
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", module],
            environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, fd, LISTEN_FDS_START + i) for i, fd in enumerate(moved)],
            setsigdef=SIGNALS,
            setsigmask=SIGNALS,
        )
    finally:
        for fd in moved:
            os.close(fd)


def take_signals(*numbers: signal.Signals) -> None:
    """Let these signals come, also those that were sent since this process was started."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)


def listened_fds() -> dict[str, int]:
    """Return the descriptors this process was started with, by name; no child of ours takes them for its own."""
    pid, count, names = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    # The parent of a process started by `spawn` does not know its pid.
    if not count.isdigit() or (pid and pid != str(os.getpid())):
        return {}
    fds = {}
    for i, name in zip(range(int(count)), names.split(":"), strict=False):
        os.set_inheritable(LISTEN_FDS_START + i, False)
        fds[name] = LISTEN_FDS_START + i
    return fds


@contextlib.contextmanager
def signals_as_bytes() -> Iterator[socket.socket]:
    """Catch SIGTERM, and SIGINT where a terminal has not sent it to the daemon too; give their numbers as bytes."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, _noted) for number in SIGNALS}
    try:
        with ours, theirs:
            yield ours
    finally:
        signal.set_wakeup_fd(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _noted(_number: int, _frame: object) -> None:
    """The wakeup descriptor has it already."""
