"""Descriptors that must outlive the daemon: those of the upper folder's open files, kept by whoever started it.

The daemon's side is systemd's protocol for its descriptor store (sd_notify(3), FDSTORE=1); the holder plays
systemd's part, and passes on to systemd, where there is one, what it keeps.  Each name is used once:

    upper-<inode, 16 hex digits>-<r or w>-<8 hex digits>

so that what is removed and what is stored a moment later never meet.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import resource
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lazyimg.daemon.notify import FDS_IN_MESSAGE_MAX, barrier, close_all, notify

# Descriptors a process needs for itself, beyond those it keeps for others.
OWN_FDS = 256
# A process inherits so many: their names are one string of its environment, which may have 128 KiB (execve(2)).
INHERITED_MAX = 3000
_NAME = re.compile(r"upper-([0-9a-f]{16})-([rw])-[0-9a-f]{8}")
# Between two processes of ours: names joined like $LISTEN_FDNAMES, and the end of all of them.
_END = b":"


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A descriptor of an open upper file."""

    name: str
    fd: int
    inode: int
    is_writing: bool


class FdStore:
    """The daemon's side.  Methods block, call them in threads; `stored` are descriptors the store has already."""

    def __init__(self, stored: Mapping[str, int] | None = None) -> None:
        self._fds = dict(stored or {})
        self._lock = threading.Lock()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._count_max = max(soft - OWN_FDS, 1)

    def put(self, inode: int, fd: int, *, is_writing: bool) -> str:
        """Return, with its name, once the store has the descriptor, which stays the caller's.

        Raises OSError with EMFILE where the store is full.  Without a store, one that died, it is kept for the next.
        """
        name = f"upper-{inode:016x}-{'w' if is_writing else 'r'}-{secrets.token_hex(4)}"
        with self._lock:
            if len(self._fds) >= self._count_max:
                raise OSError(errno.EMFILE, "too many open files; raise the daemon's limit (LimitNOFILE)")
            self._fds[name] = fd
        # The barrier: systemd drops what a process sent that ended before its message was looked at.
        if store(name, fd):
            barrier()
        return name

    def remove(self, name: str) -> None:
        """Give a name up; its descriptor can be closed from here on."""
        with self._lock:
            self._fds.pop(name, None)
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")

    @contextlib.contextmanager
    def moving(self) -> Iterator[dict[str, int]]:
        """Give the block what another store must have from its first instant; $NOTIFY_SOCKET names that one at its end.

        Meanwhile nothing is removed, and so nothing closed.
        """
        with self._lock:
            yield dict(itertools.islice(self._fds.items(), INHERITED_MAX))
            for name, fd in itertools.islice(self._fds.items(), INHERITED_MAX, None):
                store(name, fd)


def store(name: str, fd: int) -> bool:
    """Have whoever started this process keep a copy of a descriptor; False where nobody listens."""
    return notify(f"FDSTORE=1\nFDNAME={name}", [fd])


class KeptFds:
    """The holder's side: descriptors by name, all of them its own."""

    def __init__(self, fds: Mapping[str, int] | None = None) -> None:
        self._fds = dict(fds or {})

    def take(self, variables: Mapping[str, str], fds: list[int]) -> bool:
        """Do what a notification asks; False if it asks nothing of a store.  `fds` are ours from here on."""
        name = variables.get("FDNAME", "")
        if variables.get("FDSTORE") == "1" and _NAME.fullmatch(name) and len(fds) == 1:
            close_all([self._fds.pop(name)] if name in self._fds else [])
            self._fds[name] = fds[0]
            return True
        close_all(fds)
        if variables.get("FDSTOREREMOVE") == "1":
            close_all([self._fds.pop(name)] if name in self._fds else [])
            return True
        return False

    def all(self) -> dict[str, int]:
        return dict(self._fds)

    def close(self) -> None:
        close_all(list(self._fds.values()))
        self._fds.clear()


def stored_file(name: str, fd: int) -> StoredFile | None:
    """Return what a stored descriptor stands for; None for a name that is not one of ours."""
    match = _NAME.fullmatch(name)
    return None if match is None else StoredFile(name, fd, int(match[1], 16), match[2] == "w")


def send_all(channel: socket.socket, fds: Mapping[str, int]) -> None:
    """Pass descriptors on over a SOCK_SEQPACKET.  Raises OSError."""
    names = list(fds)
    for at in range(0, len(names), FDS_IN_MESSAGE_MAX):
        some = names[at : at + FDS_IN_MESSAGE_MAX]
        socket.send_fds(channel, [":".join(some).encode()], [fds[name] for name in some])
    channel.send(_END)


def receive_all(channel: socket.socket) -> dict[str, int]:
    """Return the descriptors of `send_all`, waiting for them.  Raises EOFError if the sender is gone."""
    return dict(_received(channel))


def _received(channel: socket.socket) -> Iterator[tuple[str, int]]:
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 1 << 16, FDS_IN_MESSAGE_MAX)
        if not data:
            raise EOFError
        if data == _END:
            return
        for fd in fds:
            os.set_inheritable(fd, False)
        yield from zip(data.decode().split(":"), fds, strict=True)
