"""FUSE's opening handshake: what the kernel is told, and how a session takes over."""

from __future__ import annotations

import os
import select
import socket
import struct

import pytest

from lazyimg.daemon import handshake
from lazyimg.daemon.handshake import (
    CONGESTION_THRESHOLD,
    FUSE_INIT,
    FUSE_PARALLEL_DIROPS,
    MAX_BACKGROUND,
    WRITE_BYTES_MAX,
    Resumption,
)
from lazyimg.errors import MountFailed

# <linux/fuse.h>, fuse_in_header and fuse_init_in as Linux 6.18 sends it: 104 bytes.
UNIQUE = 2


def init_request(opcode: int = FUSE_INIT) -> bytes:
    body = struct.pack("<IIII", 7, 39, 131072, 0x73FF_FFFB) + bytes(48)
    return struct.pack("<IIQQIIII", 40 + len(body), opcode, UNIQUE, 0, 0, 0, 0, 0) + body


def init_answer(write_bytes_max: int = WRITE_BYTES_MAX) -> bytes:
    body = struct.pack("<IIIIHHII", 7, 31, 131072, 0, 0, 0, write_bytes_max, 1) + bytes(36)
    return struct.pack("<IiQ", 16 + len(body), 0, UNIQUE) + body


def test_kernels_request_is_read() -> None:
    """The first request is taken whole, as the next daemon will need it."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, ours:
        kernel.send(init_request())
        assert handshake.read_init(ours.fileno()) == init_request()


def test_other_first_request_is_refused() -> None:
    """A descriptor whose handshake is over is not taken for a fresh mount."""
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, ours:
        kernel.send(init_request(opcode=1))
        with pytest.raises(MountFailed, match="opcode 1, not FUSE_INIT"):
            handshake.read_init(ours.fileno())


def test_silent_kernel_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5] No request at all is an error after a while."""
    monkeypatch.setattr(handshake, "ANSWER_TIMEOUT_S", 0.01)
    kernel, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, ours, pytest.raises(MountFailed, match="sent no FUSE_INIT"):
        handshake.read_init(ours.fileno())


def test_answer_is_libfuses_but_for_our_limits() -> None:
    """[I6] This machine's libfuse answers; only the limits and the flag of parallel lookups differ from its answer."""
    answer = handshake.libfuse_answer(init_request())
    amended = handshake.amended(answer)
    _, error, unique = struct.unpack_from("<IiQ", answer)
    assert (error, unique) == (0, UNIQUE)
    before, after = (struct.unpack_from("<IIIIHHI", one, 16) for one in (answer, amended))
    assert after[:3] == before[:3]
    assert after[3] == before[3] | FUSE_PARALLEL_DIROPS
    assert after[4:] == (MAX_BACKGROUND, CONGESTION_THRESHOLD, WRITE_BYTES_MAX)
    assert amended[:16] == answer[:16]
    assert amended[40:] == answer[40:]
    # What a later daemon compares with what its own libfuse answers.
    assert handshake.amended(amended) == amended


def test_garbage_is_refused_by_libfuse() -> None:
    """A request that libfuse does not answer well is an error that names the package, not a hang."""
    with pytest.raises(MountFailed, match=r"libfuse"):
        handshake.libfuse_answer(b"\0" * 104)


def test_session_gets_init_and_then_the_mount() -> None:
    """libfuse first reads the kernel's old INIT; after the take-over its descriptor is the mount's."""
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, fuse:
        resumption = Resumption(fuse.fileno(), init_request(), init_answer())
        assert resumption.mountpoint == f"/dev/fd/{resumption.session_fd}"
        assert os.read(resumption.session_fd, 1 << 20) == init_request()
        number = resumption.session_fd
        resumption.take_over()
        assert resumption.session_fd == number
        kernel.send(b"the next request")
        assert os.read(number, 1 << 20) == b"the next request"
        with pytest.raises(BlockingIOError):
            os.read(number, 1 << 20)
        os.close(number)


def test_mount_keeps_what_the_kernel_was_promised() -> None:
    """A daemon of another release serves writes as large as the mount's first daemon allowed."""
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, fuse:
        resumption = Resumption(fuse.fileno(), init_request(), init_answer(1 << 20))
        assert resumption.write_bytes_max == 1 << 20
        resumption.take_over()
        os.close(resumption.session_fd)
    assert handshake.amended(init_answer(1 << 20)) == handshake.amended(init_answer())


def resend(fuse_fd: int) -> bool:
    """Take a mount over, ask for what was taken, and give the session up again."""
    resumption = Resumption(fuse_fd, init_request(), init_answer())
    try:
        resumption.take_over()
        return resumption.resend()
    finally:
        os.close(resumption.session_fd)


def test_resend_is_asked_of_the_kernel() -> None:
    """[I9] The kernel is told to send again what a dead daemon had taken."""
    kernel, fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, fuse:
        assert resend(fuse.fileno())
        # A notification is an answer to nothing (unique 0) with its code as error.
        assert struct.unpack("<IiQ", kernel.recv(100)) == (16, 7, 0)


def test_kernel_that_cannot_resend_is_no_fault() -> None:
    """[I6] Before Linux 6.9 the kernel refuses the notification with EINVAL; the daemon serves all the same."""
    # An epoll descriptor refuses every write so.
    with select.epoll() as refusing:
        assert not resend(refusing.fileno())
