"""Descriptors kept outside the daemon: systemd's protocol, spoken and heard."""

from __future__ import annotations

import errno
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lazyimg.daemon.fdstore import FdStore, KeptFds, receive_all, send_all, stored_file
from lazyimg.daemon.notify import barrier, open_listener, receive

INODE = 1 << 63 | 0xABC


class Holder:
    """A store that listens in a thread, as a holder does."""

    def __init__(self) -> None:
        self.listener, self.address = open_listener()
        self.listener.setblocking(True)
        self.kept = KeptFds()
        self.heard: list[dict[str, str]] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while (message := receive(self.listener)) is not None and "END" not in message[0]:
            self.heard.append(message[0])
            self.kept.take(*message)

    def end(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"END=1", "\0" + self.address[1:])
        self._thread.join()
        self.listener.close()
        self.kept.close()


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Holder]:
    made = Holder()
    monkeypatch.setenv("NOTIFY_SOCKET", made.address)
    yield made
    made.end()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_stored_when_put_returns(holder: Holder, file: int) -> None:
    """[I9] Once `put` has returned the holder has the very same file, by a name that systemd allows."""
    name = FdStore().put(INODE, file, is_writing=True)
    assert os.path.sameopenfile(holder.kept.all()[name], file)
    # systemd.service(5), FDNAME: at most 255 characters, no control characters, no colon.
    assert re.fullmatch(r"[!-9;-~]{1,255}", name)
    found = stored_file(name, file)
    assert found is not None
    assert (found.inode, found.is_writing) == (INODE, True)


def test_removed_descriptor_is_closed(holder: Holder, file: int) -> None:
    """A name given up is forgotten, another of the same file stays."""
    store = FdStore()
    one, other = store.put(INODE, file, is_writing=False), store.put(INODE, file, is_writing=False)
    store.remove(one)
    assert barrier()
    assert set(holder.kept.all()) == {other}


@pytest.mark.parametrize(
    "message",
    [
        "FDSTORE=1\nFDNAME=fuse",
        "FDSTORE=1",
        "FDSTORE=1\nFDNAME=upper-1-r-2",
        "FDSTOREREMOVE=1\nFDNAME=x",
        "A=1",
    ],
)
def test_unknown_descriptor_is_closed(holder: Holder, file: int, message: str) -> None:
    """What is not an open file's, or asks nothing, leaves nothing behind in the holder."""
    before = len(os.listdir("/proc/self/fd"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect("\0" + holder.address[1:])
        socket.send_fds(sender, [message.encode()], [file])
    assert barrier()
    assert holder.kept.all() == {}
    assert len(os.listdir("/proc/self/fd")) == before


def test_name_stored_twice_is_kept_once(file: int) -> None:
    """A descriptor that comes again under its name takes the place of the first, which is closed."""
    kept = KeptFds()
    name = f"upper-{INODE:016x}-r-00000000"
    first, second = os.dup(file), os.dup(file)
    for fd in (first, second):
        assert kept.take({"FDSTORE": "1", "FDNAME": name}, [fd])
    assert kept.all() == {name: second}
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(first)
    kept.close()


def test_without_a_holder_files_open_all_the_same(
    monkeypatch: pytest.MonkeyPatch, file: int, holder: Holder
) -> None:
    """[I9] What is opened while no holder lives is given to the next one, as far as a process can inherit it."""
    monkeypatch.setenv("NOTIFY_SOCKET", "@nobody-listens-here")
    monkeypatch.setattr("lazyimg.daemon.fdstore.INHERITED_MAX", 1)
    store = FdStore()
    names = [store.put(INODE, file, is_writing=is_writing) for is_writing in (True, False)]
    assert holder.kept.all() == {}
    with store.moving() as inherited:
        monkeypatch.setenv("NOTIFY_SOCKET", holder.address)
    assert inherited == {names[0]: file}
    assert barrier()
    assert set(holder.kept.all()) == {names[1]}


def test_full_store_refuses_to_open(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    """[I5] More descriptors than the process may have are EMFILE, before they are stored."""
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setattr("lazyimg.daemon.fdstore.resource.getrlimit", lambda _: (256 + 2, 4096))
    store = FdStore()
    names = [store.put(INODE, file, is_writing=False) for _ in range(2)]
    with pytest.raises(OSError, match="too many open files") as caught:
        store.put(INODE, file, is_writing=False)
    assert caught.value.errno == errno.EMFILE
    store.remove(names[0])
    store.put(INODE, file, is_writing=False)


def test_all_descriptors_are_passed_on(file: int) -> None:
    """[I9] The next daemon gets every descriptor under its name, more of them than fit one message."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds = {f"upper-{inode:016x}-w-00000000": os.dup(file) for inode in range(300)}
    with ours, theirs:
        send_all(ours, fds)
        received = receive_all(theirs)
        assert list(received) == list(fds)
        assert all(os.path.sameopenfile(fd, file) for fd in received.values())
        assert not any(os.get_inheritable(fd) for fd in received.values())
        ours.close()
        with pytest.raises(EOFError):
            receive_all(theirs)
    for fd in (*fds.values(), *received.values()):
        os.close(fd)


@pytest.mark.parametrize("name", ["fuse", "upper-abc-r-00000000", "", "upper-00000000000000ab-x-00000000"])
def test_other_names_are_no_open_files(name: str) -> None:
    """A descriptor of another name, such as another version's, stands for no open file."""
    assert stored_file(name, 0) is None
