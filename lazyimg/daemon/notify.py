"""systemd's notification protocol, both ends (sd_notify(3)).

The daemon speaks it whoever listens: systemd, or the holder, which plays systemd's part.
"""

from __future__ import annotations

import os
import socket

NOTIFY_BYTES_MAX = 4096


def notify(message: str) -> None:
    """Send a message such as "READY=1" to $NOTIFY_SOCKET; nothing happens where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            # A leading @ stands for the abstract namespace's NUL.
            sender.connect("\0" + address[1:] if address.startswith("@") else address)
            sender.send(message.encode())
        except OSError:
            # Nobody to tell; the daemon is not worse for it.
            return


def open_listener() -> tuple[socket.socket, str]:
    """Return a socket for notifications and its address for a child's $NOTIFY_SOCKET."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    # An empty name makes the kernel choose a free abstract one (unix(7), "Autobind").
    listener.bind("")
    name = listener.getsockname()
    assert isinstance(name, bytes)
    return listener, "@" + name[1:].decode()
