"""What joins the daemon to its holder: orders from it, and another one when it dies.

The holder is known to be dead when its end of the orders' socket closes.  The daemon then starts another, which is
its child but does not die with it, and hands it everything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
from collections.abc import Mapping
from dataclasses import replace

import trio

from lazyimg.daemon.fdstore import FdStore
from lazyimg.daemon.handover import DRAIN, GOES_ON, RESTART, TAKEN_UP, YIELDED, Handover
from lazyimg.daemon.notify import notify, open_listener
from lazyimg.daemon.session import Session
from lazyimg.daemon.spawn import spawn
from lazyimg.errors import InUse, RestartRefused

logger = logging.getLogger(__name__)

ORDER_BYTES_MAX = 1 << 16
# Pauses between holders that die before they have taken the mount up.  While there is none a killed daemon is the end
# of the mount, so one that had is replaced at once, however often that happens.
HOLDER_PAUSE_MIN_S = 0.1
HOLDER_PAUSE_MAX_S = 5.0
# The holder gives up first, and says why.
ANSWER_MARGIN_S = 10


class HolderLink:
    """The daemon's end.  `kept` are the descriptors every holder needs; they stay the caller's."""

    def __init__(
        self,
        orders: socket.socket,
        handover: Handover,
        kept: Mapping[str, int],
        store: FdStore,
        session: Session,
    ) -> None:
        self.holder_pid = handover.holder_pid
        self._orders = orders
        self._handover = handover
        self._kept = kept
        self._store = store
        self._session = session
        self._answers: trio.MemorySendChannel[str] | None = None
        # The first one has started this daemon.
        self._is_taken_up = True

    async def listen(self) -> None:
        """Do what the holder orders, and replace it when it dies, for ever."""
        pause_s = 0.0
        while True:
            await self._obey()
            if self._is_taken_up:
                pause_s = 0.0
            logger.error("the holder, process %d, died; starting another in %.1f s", self.holder_pid, pause_s)
            await trio.sleep(pause_s)
            pause_s = min(max(HOLDER_PAUSE_MIN_S, pause_s * 2), HOLDER_PAUSE_MAX_S)
            await trio.to_thread.run_sync(self._start_holder)

    async def restart(self) -> None:
        """Ask the holder for another daemon; return when this one is about to end.

        Raises RestartRefused with the reason; this daemon then goes on.
        """
        if self._answers is not None:
            raise InUse("a restart is under way; wait for its end")
        self._answers, answers = trio.open_memory_channel[str](1)
        try:
            notify(f"{RESTART}=1")
            with trio.move_on_after(3 * self._handover.config.restart_timeout + ANSWER_MARGIN_S):
                reason = await answers.receive()
                if reason:
                    raise RestartRefused(f"not restarted, the old daemon goes on: {reason}")
                return
            raise RestartRefused("not restarted, the old daemon goes on: the holder does not answer")
        finally:
            self._answers = None

    async def give_up_mount(self) -> None:
        """Drain and end, since a holder that systemd started has the mount.  Raises RestartRefused."""
        await self._session.drain()
        notify(f"{YIELDED}=1")
        self._session.leave()

    async def _obey(self) -> None:
        """Do what is ordered until the holder dies."""
        orders = trio.socket.from_stdlib_socket(self._orders)
        while order := await _next(orders):
            if order == TAKEN_UP:
                self._is_taken_up = True
            elif order != DRAIN:
                self._answer(order)
            elif await self._is_drained():
                if self._is_alone():
                    self._session.go_on()
                    self._answer("the holder died; try again")
                    continue
                self._answer("")
                self._session.leave()

    async def _is_drained(self) -> bool:
        try:
            await self._session.drain()
        except RestartRefused as exc:
            # The holder answers with this reason, once it has ended the other daemon.
            notify(f"{GOES_ON}={exc}")
            return False
        return True

    def _is_alone(self) -> bool:
        """True if the holder has died."""
        poll = select.poll()
        poll.register(self._orders, 0)
        return bool(poll.poll(0))

    def _answer(self, reason: str) -> None:
        if self._answers is not None:
            # Nobody has read the last one yet; it says enough.
            with contextlib.suppress(trio.WouldBlock):
                self._answers.send_nowait(reason)

    def _start_holder(self) -> None:
        self._orders.close()
        self._is_taken_up = False
        _reap(self.holder_pid)
        listener, address = open_listener()
        self._orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._orders.setblocking(False)
        memory = replace(self._handover, is_planned=False).to_memory()
        own_pid_fd = os.pidfd_open(os.getpid())
        fds = {
            "handover": memory,
            "daemon": own_pid_fd,
            "orders": theirs.fileno(),
            "notify": listener.fileno(),
        }
        try:
            # Inherited, not sent: this daemon may die before the other process can take anything.
            with self._store.moving() as stored:
                self.holder_pid = spawn(
                    "lazyimg.daemon.holder", {**self._kept, **fds, **stored}, self._handover.manager
                )
                os.environ["NOTIFY_SOCKET"] = address
        finally:
            os.close(memory)
            os.close(own_pid_fd)
            theirs.close()
            listener.close()


async def _next(orders: trio.socket.SocketType) -> str:
    """Return the next order, "" when the holder is dead."""
    try:
        return (await orders.recv(ORDER_BYTES_MAX)).decode()
    except ConnectionError:
        return ""


def _reap(pid: int) -> None:
    """Take note of the end of a holder that this daemon started; the first one is not its child."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return
