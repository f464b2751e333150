"""systemd's notification protocol, both ends (sd_notify(3)), and descriptors that travel over sockets.

The daemon speaks it whoever listens: systemd, or the holder, which plays systemd's part.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections.abc import Sequence

# A message of ours that carries a configuration is about 3 KB.
NOTIFY_BYTES_MAX = 1 << 16
# The kernel takes no more in one message (SCM_MAX_FD).
FDS_IN_MESSAGE_MAX = 253
# Whoever listens answers at once, or is stopped, or gone.
SEND_TIMEOUT_S = 5


def notify(message: str, fds: Sequence[int] = ()) -> bool:
    """Send a message such as "READY=1" to $NOTIFY_SOCKET; False where nobody listens, and nothing happens.

    What was sent, with its descriptors, lies in the listener's socket, whatever becomes of this process.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.settimeout(SEND_TIMEOUT_S)
        try:
            # A leading @ stands for the abstract namespace's NUL.
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            socket.send_fds(sender, [message.encode()], list(fds))
        except OSError:
            # Nobody to tell; the caller is not worse for it.
            return False
    return True


def barrier() -> bool:
    """Wait until all that was sent so far has been taken out of the socket (sd_notify_barrier(3))."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            if not notify("BARRIER=1", [theirs]):
                return False
        finally:
            os.close(theirs)
        poll = select.poll()
        poll.register(ours, 0)
        return bool(poll.poll(SEND_TIMEOUT_S * 1000))
    finally:
        os.close(ours)


def open_listener() -> tuple[socket.socket, str]:
    """Return a socket for notifications and its address for a child's $NOTIFY_SOCKET."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    # An empty name makes the kernel choose a free abstract one (unix(7), "Autobind").
    listener.bind("")
    return listener, address_of(listener)


def address_of(listener: socket.socket) -> str:
    """Return the address of an abstract socket for $NOTIFY_SOCKET."""
    name = listener.getsockname()
    assert isinstance(name, bytes)
    return "@" + name[1:].decode()


def receive(listener: socket.socket) -> tuple[dict[str, str], list[int]] | None:
    """Return the next message's variables and its descriptors, which are the caller's; None if none waits."""
    try:
        data, fds, _, _ = socket.recv_fds(listener, NOTIFY_BYTES_MAX, FDS_IN_MESSAGE_MAX)
    except BlockingIOError:
        return None
    for fd in fds:
        os.set_inheritable(fd, False)
    lines = (line.partition("=") for line in data.decode(errors="replace").splitlines())
    return {name: value for name, _, value in lines}, fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors; one that cannot be closed is gone all the same (close(2))."""
    for fd in fds:
        with contextlib.suppress(OSError):
            os.close(fd)
