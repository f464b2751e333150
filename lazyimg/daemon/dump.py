"""What the daemon is doing, written to its log on SIGUSR1: threads, tasks and the reads that wait.

Names of functions and lines only, no values: nothing secret can be in it.  The threads' part comes from
faulthandler, which needs neither the event loop nor the interpreter to be free.
"""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from types import FrameType

import trio

from lazyimg.daemon.inflight import InFlight
from lazyimg.daemon.spawn import take_signals
from lazyimg.logs import UNLIMITED

logger = logging.getLogger(__name__)

# Tasks that wait in the same place are told once, with their number; there are few different places.
STACKS_MAX = 100
# The innermost frames of each.
FRAMES_MAX = 16
# Things awaited one by the other; more would be a ring.
AWAITS_MAX = 200
# Where every task waits in the end; it says nothing.
HIDDEN = "/trio/_core/"
READS_MAX = 100


async def dump_on_signal(in_flight: InFlight) -> None:
    """On each SIGUSR1 write a dump; runs until cancelled."""
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        # Before the receiver's handler, which it calls.
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True, chain=True)
        # Whoever started us blocked it, since it would have ended us until now.
        take_signals(signal.SIGUSR1)
        try:
            async for _ in signals:
                for line in dump_lines(in_flight):
                    logger.warning("%s", line, extra=UNLIMITED)
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            faulthandler.unregister(signal.SIGUSR1)


def dump_lines(in_flight: InFlight) -> Iterator[str]:
    """Yield the dump, line by line; where tasks wait that are many, the commonest places first."""
    places = Counter(_place(task) for task in _tasks())
    yield f"dump of daemon {os.getpid()}: {places.total()} tasks in {len(places)} places"
    for (name, frames), count in places.most_common(STACKS_MAX):
        yield f"{count} x {name}"
        yield from (f"    {frame}" for frame in frames)
    now = in_flight.statistics()
    yield f"{now.reads_in_flight} reads wait, {now.in_flight} requests in all"
    for read in now.reads[:READS_MAX]:
        what = "upper folder" if read.image is None else f"image {read.image}"
        yield (
            f"    {what}: [{read.start}, {read.stop}) for {read.age_s:.1f} s, waits for {read.waits_for}, "
            f"{read.retries} retries"
        )
    yield "end of dump"


def _tasks() -> Iterator[trio.lowlevel.Task]:
    """Yield every task of this run."""
    root = trio.lowlevel.current_root_task()
    waiting = [] if root is None else [root]
    while waiting:
        task = waiting.pop()
        yield task
        for nursery in task.child_nurseries:
            waiting.extend(nursery.child_tasks)


def _place(task: trio.lowlevel.Task) -> tuple[str, tuple[str, ...]]:
    """Return a task's name and where it waits, outermost frame first."""
    frames = [
        f"{_short(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
        for frame in _frames(task.coro)
        if HIDDEN not in frame.f_code.co_filename
    ]
    return task.name, tuple(frames[-FRAMES_MAX:])


def _frames(awaited: object) -> Iterator[FrameType]:
    """Yield the frames of a coroutine and of what it waits for, as Task.iter_await_frames does.

    That one ends at pyfuse3's coroutines, which are Cython's: they are awaited through a wrapper that shows what
    it wraps to the garbage collector alone.
    """
    for _ in range(AWAITS_MAX):
        kind = next((one for one in ("cr", "gi", "ag") if hasattr(awaited, f"{one}_frame")), None)
        if kind is None:
            awaited = next((one for one in gc.get_referents(awaited) if _is_awaitable(one)), None)
            if awaited is None:
                return
            continue
        frame = getattr(awaited, f"{kind}_frame")
        if isinstance(frame, FrameType):
            yield frame
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


def _is_awaitable(value: object) -> bool:
    return hasattr(value, "cr_frame") or hasattr(value, "ag_frame")


def _short(path: str) -> str:
    """Return the last two parts of a module's path."""
    return "/".join(PurePath(path).parts[-2:])
