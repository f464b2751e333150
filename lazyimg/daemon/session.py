"""The FUSE session of one daemon: from taking the descriptor over to the mount's end, or to the next daemon.

To make room for another daemon it is drained: no request is taken any more, those taken are answered.  What cannot
be answered soon, such as a read that waits for Glance, is left where the kernel sends it again (Linux 6.9), and
waited for where it does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import pyfuse3
import trio

from lazyimg.daemon.handshake import Resumption
from lazyimg.daemon.loop import Gate, quicken
from lazyimg.daemon.requestbuffers import RequestBuffers
from lazyimg.errors import RestartRefused

logger = logging.getLogger(__name__)
T = TypeVar("T", bound=pyfuse3.Operations)

# Present bytes and the upper folder answer within this; while it lasts, nobody else's request is taken.
LEAVE_AFTER_S = 0.2


class Session:
    """Serves one mount.  `drain_timeout_s` counts where requests cannot be left."""

    def __init__(self, resumption: Resumption, *, tasks_max: int, drain_timeout_s: float) -> None:
        self._resumption = resumption
        self._tasks_max = tasks_max
        self._drain_timeout_s = drain_timeout_s
        self._gate: Gate | None = None
        self._can_resend = False
        self._loop: trio.lowlevel.Task | None = None
        self._scope = trio.CancelScope()
        # True once another daemon shall have the mount: it is not unmounted.
        self.is_left = False

    async def serve(
        self,
        make_filesystem: Callable[[trio.Nursery], T],
        *,
        task_status: trio.TaskStatus[T],
    ) -> None:
        """Answer the kernel until the mount is gone or left; started with what `make_filesystem` returned.

        It is given a nursery for what a handler does after its answer.
        """
        self._loop = trio.lowlevel.current_task()
        async with trio.open_nursery() as after_answers:
            filesystem = make_filesystem(after_answers)
            pyfuse3.init(filesystem, self._resumption.mountpoint, set(pyfuse3.default_options))
            try:
                self._gate = quicken(
                    self._resumption.session_fd, RequestBuffers(self._resumption.write_bytes_max)
                )
                task_status.started(filesystem)
                self._can_resend = self._resumption.resend()
                with self._scope:
                    await pyfuse3.main(max_tasks=self._tasks_max)
            finally:
                pyfuse3.close(unmount=False)

    async def drain(self) -> None:
        """Take no further request; return when all are answered or can be left.

        Raises RestartRefused where they cannot: this session then goes on.
        """
        if self._gate is None or self._loop is None:
            raise RestartRefused(
                "this release of pyfuse3 was not tried; stop guests, unmount and mount again"
            )
        self._gate.shut()
        with trio.move_on_after(LEAVE_AFTER_S if self._can_resend else self._drain_timeout_s):
            await self._gate.wait_drained(self._loop)
            return
        if not self._can_resend:
            self._gate.open()
            raise RestartRefused(
                "requests wait, and this kernel cannot send them again; try when Glance answers"
            )

    def go_on(self) -> None:
        """Take requests again."""
        if self._gate is not None:
            self._gate.open()

    def leave(self) -> None:
        """End the session without its mount."""
        self.is_left = True
        self._scope.cancel()
