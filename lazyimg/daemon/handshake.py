"""FUSE's opening handshake, taken apart so that a daemon can be replaced and the mount's limits lifted.

libfuse 3.14 answers FUSE_INIT with max_background=0, so that the kernel lets only 12 background requests wait,
and does not ask for parallel lookups in one folder: a few stalled reads, or one slow lookup, then stop the
whole mount.  So the kernel's INIT is read here, a throwaway libfuse session answers it over a socket pair, the
answer is amended and given to the kernel; every daemon, the first one too, then replays INIT to its own
libfuse and takes over the descriptor (`resume`).

Layouts are those of <linux/fuse.h>, protocol 7.31 and later:

    fuse_in_header   len u32 | opcode u32 | unique u64 | nodeid u64 | uid u32 | gid u32 | pid u32 | pad u32
    fuse_out_header  len u32 | error i32 | unique u64
    fuse_init_out    major u32 | minor u32 | max_readahead u32 | flags u32 | max_background u16
                     | congestion_threshold u16 | max_write u32 | time_gran u32 | max_pages u16 | ...
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import struct

from lazyimg.errors import MountFailed

FUSE_INIT = 26
FUSE_PARALLEL_DIROPS = 1 << 18
FUSE_NOTIFY_RESEND = 7
# The largest the kernel takes (u16); reads of absent chunks must never fill it up.
MAX_BACKGROUND = 65535
CONGESTION_THRESHOLD = 49152
# Room for so much is kept in memory for each request in flight (requestbuffers.py).  Copies of 2 GiB with fsync took
# 2.6 and 3.2 s with 1 MiB, 3.1 and 3.9 s with 256 KiB, 6.0 and 6.8 s with 128 KiB.
WRITE_BYTES_MAX = 256 << 10
# One INIT request and its answer are far below this.
INIT_BYTES_MAX = 1 << 16
# libfuse's read buffer wants at least FUSE_MIN_READ_BUFFER; the kernel refuses shorter reads with EINVAL.
_READ_BYTES = (1 << 20) + 4096
ANSWER_TIMEOUT_S = 20

_IN_HEADER = struct.Struct("<IIQQIIII")
_OUT_HEADER = struct.Struct("<IiQ")
_INIT_OUT = struct.Struct("<IIIIHHI")


def read_init(fuse_fd: int) -> bytes:
    """Return the kernel's FUSE_INIT request, waiting for it.  Raises MountFailed on anything else."""
    poll = select.poll()
    poll.register(fuse_fd, select.POLLIN)
    if not poll.poll(ANSWER_TIMEOUT_S * 1000):
        raise MountFailed("the kernel sent no FUSE_INIT; unmount and mount again")
    request = os.read(fuse_fd, _READ_BYTES)
    _, opcode, *_ = _IN_HEADER.unpack_from(request)
    if opcode != FUSE_INIT:
        raise MountFailed(
            f"the kernel's first request has opcode {opcode}, not FUSE_INIT; unmount and mount again"
        )
    return request


def is_gone(fuse_fd: int) -> bool:
    """True once nothing is mounted on this connection any more: the kernel has ended it."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return bool(poll.poll(0))


def libfuse_answer(init_request: bytes) -> bytes:
    """Return what this machine's libfuse answers to `init_request`, from a throwaway child.

    Forks: call it before any thread is started.  Raises MountFailed.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        child = os.fork()
        if child == 0:
            _answer_and_exit(theirs)
        theirs.close()
        try:
            ours.settimeout(ANSWER_TIMEOUT_S)
            ours.send(init_request)
            answer = ours.recv(INIT_BYTES_MAX)
        except OSError as exc:
            raise MountFailed(f"libfuse did not answer FUSE_INIT: {exc}; check the package fuse3") from exc
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if len(answer) < _OUT_HEADER.size + _INIT_OUT.size or _OUT_HEADER.unpack_from(answer)[1] != 0:
        raise MountFailed("libfuse refused FUSE_INIT; check that fuse3 and pyfuse3 fit this kernel")
    return answer


def amended(answer: bytes) -> bytes:
    """Return libfuse's answer with the mount's limits lifted and parallel lookups asked for."""
    body = bytearray(answer)
    major, minor, readahead, flags, _, _, write_bytes = _INIT_OUT.unpack_from(body, _OUT_HEADER.size)
    _INIT_OUT.pack_into(
        body,
        _OUT_HEADER.size,
        major,
        minor,
        readahead,
        flags | FUSE_PARALLEL_DIROPS,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        min(write_bytes, WRITE_BYTES_MAX),
    )
    return bytes(body)


def open_session(fuse_fd: int) -> tuple[bytes, bytes]:
    """Answer the kernel's INIT on a fresh mount; return request and answer, for later daemons.  Raises MountFailed."""
    request = read_init(fuse_fd)
    answer = amended(libfuse_answer(request))
    os.write(fuse_fd, answer)
    return request, answer


class Resumption:
    """Lets a new libfuse session take over a mount whose INIT was answered long ago.

    `mountpoint` is what to give to `pyfuse3.init`; `Operations.init` must call `take_over()`: libfuse's answer
    then goes to the kernel, which refuses a second one with ENOENT, and libfuse ignores that.
    """

    def __init__(self, fuse_fd: int, init_request: bytes, init_answer: bytes) -> None:
        """init_answer: what the kernel was answered."""
        self._fuse_fd = fuse_fd
        # The largest write that the kernel sends.
        self.write_bytes_max: int = _INIT_OUT.unpack_from(init_answer, _OUT_HEADER.size)[6]
        feeder, session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        feeder.send(init_request)
        # Plain numbers: libfuse closes the session's, and a socket object would close that number once more.
        self._feeder_fd, self._session_fd = feeder.detach(), session.detach()
        os.set_blocking(fuse_fd, False)

    @property
    def mountpoint(self) -> str:
        return f"/dev/fd/{self._session_fd}"

    @property
    def session_fd(self) -> int:
        return self._session_fd

    def take_over(self) -> None:
        os.dup2(self._fuse_fd, self._session_fd, inheritable=False)
        os.close(self._feeder_fd)

    def resend(self) -> bool:
        """Ask the kernel to send again what a dead daemon had taken.  False before Linux 6.9, which cannot."""
        try:
            os.write(self._fuse_fd, _OUT_HEADER.pack(_OUT_HEADER.size, FUSE_NOTIFY_RESEND, 0))
        except OSError as exc:
            if exc.errno != errno.EINVAL:
                raise
            return False
        return True


def _answer_and_exit(theirs: socket.socket) -> None:
    """Run libfuse on `theirs` until it has answered; the parent kills this process."""
    try:
        import pyfuse3
        import trio

        pyfuse3.init(pyfuse3.Operations(), f"/dev/fd/{theirs.fileno()}", set(pyfuse3.default_options))
        trio.run(pyfuse3.main)
    finally:
        os._exit(1)
