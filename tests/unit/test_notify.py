"""systemd's notification protocol, spoken and heard."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lazyimg.daemon.notify import NOTIFY_BYTES_MAX, notify, open_listener


def test_message_reaches_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon says arrives at the holder's abstract socket, word for word."""
    listener, address = open_listener()
    with listener:
        assert address.startswith("@")
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        notify("READY=1\nSTATUS=serving")
        assert listener.recv(NOTIFY_BYTES_MAX) == b"READY=1\nSTATUS=serving"


def test_message_reaches_a_socket_with_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """systemd's own socket has a path."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify("STOPPING=1")
        assert listener.recv(NOTIFY_BYTES_MAX) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["", "@nobody-listens-here", "/nonesuch/notify"])
def test_nobody_to_tell_is_no_fault(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Without a listener nothing happens, and nothing is raised."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


def test_listeners_have_addresses_of_their_own() -> None:
    """Two daemons' messages are never mixed up."""
    one, one_address = open_listener()
    other, other_address = open_listener()
    with one, other:
        assert one_address != other_address
