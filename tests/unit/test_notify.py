"""systemd's notification protocol, spoken and heard."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lazyimg.daemon.notify import NOTIFY_BYTES_MAX, barrier, close_all, notify, open_listener, receive


def test_message_reaches_the_listener(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a daemon says arrives at the holder's abstract socket, word for word."""
    listener, address = open_listener()
    with listener:
        assert address.startswith("@")
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert notify("READY=1\nSTATUS=serving")
        assert receive(listener) == ({"READY": "1", "STATUS": "serving"}, [])
        assert receive(listener) is None


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
    assert not notify("READY=1")
    assert not barrier()
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify("READY=1")


def test_listeners_have_addresses_of_their_own() -> None:
    """Two daemons' messages are never mixed up."""
    one, one_address = open_listener()
    other, other_address = open_listener()
    with one, other:
        assert one_address != other_address


def test_barrier_waits_until_the_message_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The barrier ends when the listener has closed its descriptor, not before (sd_notify_barrier(3))."""
    listener, address = open_listener()
    with listener:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        monkeypatch.setattr("lazyimg.daemon.notify.SEND_TIMEOUT_S", 0.01)
        assert not barrier()
        message = receive(listener)
        assert message is not None
        variables, fds = message
        assert variables == {"BARRIER": "1"}
        close_all(fds)
