"""One daemon as its holder sees it: a process, what it says, and what it can be told.

A holder that takes over from a dead one is not the daemon's parent: it sees that it ended, not how.

A daemon that is killed while a thread of it waits for a disk, or whose files wait for one to be closed, ends when that
does, which may be never; its descriptors stay open until then.  It serves nobody any more: its main thread is ending,
or has ended, which proc_pid_stat(5) shows.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from lazyimg.daemon.fdstore import send_all
from lazyimg.daemon.handover import Handover
from lazyimg.daemon.notify import open_listener
from lazyimg.daemon.spawn import spawn

# A daemon reads its open files as soon as it runs; its imports take half a second.
HAND_OVER_TIMEOUT_S = 20
# The end of one whose disk answers takes less.
ENDING_S = 1.0
# Of the fields of proc_pid_stat(5) behind the command's name; and <linux/sched.h>.
_FLAGS, _EXIT_CODE = 6, 49
_PF_EXITING = 4


class DaemonProcess:
    """A daemon that runs; `close` it once it has ended."""

    def __init__(self, pid: int, pid_fd: int, listener: socket.socket, orders: socket.socket) -> None:
        self.pid = pid
        self.listener = listener
        self.is_ready = False
        self.is_prepared = False
        # Why it ends, if it says so.
        self.failure = ""
        # Another holder, of systemd's, has the mount.
        self.has_yielded = False
        self._ending_since_s: float | None = None
        self._pid_fd = pid_fd
        self._orders = orders

    @classmethod
    def start(cls, fds: Mapping[str, int], handover: Handover) -> DaemonProcess:
        """Start one on what every daemon needs; it waits for `hand_over`."""
        listener, address = open_listener()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(HAND_OVER_TIMEOUT_S)
        memory = handover.to_memory()
        try:
            pid = spawn(
                "lazyimg.daemon.service", {**fds, "handover": memory, "orders": theirs.fileno()}, address
            )
        finally:
            os.close(memory)
            theirs.close()
        return cls(pid, os.pidfd_open(pid), listener, ours)

    @classmethod
    def adopted(cls, pid_fd: int, orders_fd: int, listener_fd: int) -> DaemonProcess:
        """Return the daemon that started this holder."""
        listener = socket.socket(fileno=listener_fd)
        listener.setblocking(False)
        orders = socket.socket(fileno=orders_fd)
        orders.settimeout(HAND_OVER_TIMEOUT_S)
        daemon = cls(os.getppid(), pid_fd, listener, orders)
        daemon.is_ready = True
        return daemon

    @property
    def fds(self) -> tuple[int, int]:
        """What to watch: readable when it has ended, and when it says something."""
        return self._pid_fd, self.listener.fileno()

    def hand_over(self, fds: Mapping[str, int]) -> None:
        """Give it the descriptors of open files, upon which it begins to serve.  Raises OSError."""
        send_all(self._orders, fds)

    def order(self, order: str) -> None:
        """Tell it something; one that has ended is not told."""
        try:
            self._orders.send(order.encode())
        except OSError:
            return

    def signal(self, number: int) -> None:
        try:
            signal.pidfd_send_signal(self._pid_fd, number)
        except ProcessLookupError:
            return

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    def reap(self) -> int:
        """Return how it ended: an exit code, or minus a signal's number; 0 where that cannot be known."""
        try:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        except ChildProcessError:
            return 0

    def code_if_dying(self) -> int | None:
        """Return how it ends, as `reap` does, if it has been ending for a while; None if not."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        if not int(fields[_FLAGS]) & _PF_EXITING:
            return None
        now_s = time.monotonic()
        if self._ending_since_s is None:
            self._ending_since_s = now_s
        if now_s - self._ending_since_s < ENDING_S:
            return None
        return os.waitstatus_to_exitcode(int(fields[_EXIT_CODE]))

    def close(self) -> None:
        os.close(self._pid_fd)
        self.listener.close()
        self._orders.close()


def is_reaped(pid: int) -> bool:
    """True once a process has ended at last, of which note is taken if it is our child."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return not Path(f"/proc/{pid}").exists()
