"""pyfuse3's session loop, quickened, and with a gate before it.

Its loop awaits readability before every request, which is most of what a read of present bytes costs.  Here the
descriptor is asked first (poll(2): 143k instead of 42k reads/s at depth 16); and where requests follow one
another closely, as those of a guest do that reads one after the other, the loop sleeps on the descriptor itself
for a moment: trio's own way there and back costs as much as the read.  Before its first request a task has its buffer
brought into memory (requestbuffers.py).  The function replaced is private, hence the guard.
"""

from __future__ import annotations

import importlib.metadata
import logging
import select
from time import monotonic

import pyfuse3
import trio

from lazyimg.daemon.requestbuffers import RequestBuffers

logger = logging.getLogger(__name__)

# Releases whose `_session_loop` was read: it looks the function up in its module at each request.
TRIED_VERSIONS = ("3.5.",)
# Every so many requests the other tasks get their turn, whatever waits on the descriptor.
FAIRNESS_REQUESTS = 64
# Requests that follow one another within this belong together, and the next is waited for as long.  It is also
# the longest that the rest of the daemon is kept waiting for nothing, once at the end of each such row.
NEXT_REQUEST_S = 100e-6
# While the loop is drained: of a planned hand-over, guests feel the whole.
DRAIN_LOOK_S = 2e-3


class Gate:
    """Lets requests into the session loop, or not: what is in it goes on and is answered."""

    def __init__(self) -> None:
        self.is_shut = False
        # Tasks of the loop that have no request.
        self.resting = 0
        self._opened = trio.Event()

    def shut(self) -> None:
        self.is_shut = True

    def open(self) -> None:
        self.is_shut = False
        self._opened.set()
        self._opened = trio.Event()

    async def wait_open(self) -> None:
        while self.is_shut:
            await self._opened.wait()

    async def wait_drained(self, loop: trio.lowlevel.Task) -> None:
        """Return when no request is left in `loop`, the task that runs pyfuse3.main; the gate is shut."""
        while sum(len(nursery.child_tasks) for nursery in loop.child_nurseries) > self.resting:  # noqa: ASYNC110  # tasks of pyfuse3's may end without a word
            await trio.sleep(DRAIN_LOOK_S)


def quicken(session_fd: int, buffers: RequestBuffers) -> Gate | None:
    """Let the session loop take what is waiting without asking trio; None if this pyfuse3 was not tried."""
    original = getattr(pyfuse3, "_wait_fuse_readable", None)
    if original is None or not importlib.metadata.version("pyfuse3").startswith(TRIED_VERSIONS):
        logger.info("pyfuse3 is of another version than those tried; its own session loop is used")
        return None
    gate = Gate()
    poll = select.poll()
    poll.register(session_fd, select.POLLIN)
    poll_now = poll.poll
    wait_until_readable = select.select
    fds = (session_fd,)
    left = FAIRNESS_REQUESTS
    taken_at_s = 0.0
    follows_closely = False

    async def wait_fuse_readable() -> bool:
        nonlocal left, taken_at_s, follows_closely
        left -= 1
        if (
            gate.is_shut
            or left <= 0
            or not (poll_now(0) or (follows_closely and wait_until_readable(fds, (), (), NEXT_REQUEST_S)[0]))
        ):
            left = FAIRNESS_REQUESTS
            gate.resting += 1
            try:
                # Between its readiness and this task's turn another task may have polled, and taken the request: a
                # read would now fail with EAGAIN, and pyfuse3 end the mount.  From here to the read nobody else runs.
                while await original():
                    if gate.is_shut:
                        await gate.wait_open()
                    elif poll_now(0):
                        break
                else:
                    return False
            finally:
                gate.resting -= 1
        now_s = monotonic()
        follows_closely = now_s - taken_at_s < NEXT_REQUEST_S
        taken_at_s = now_s
        buffers.prepare()
        return True

    pyfuse3._wait_fuse_readable = wait_fuse_readable  # type: ignore[attr-defined]  # private; see above
    return gate
