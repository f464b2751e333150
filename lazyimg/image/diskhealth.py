"""The cache's disk as images may use it: in threads that can be left alone, and not at all while it is bad.

Everything that may wait for that disk goes through `read` or `write`.  What hangs there costs a thread of its own
and nobody's time beyond `disk_timeout`; while it hangs, or after repeated errors, nothing new is begun, and whoever
asks is told so by an OSError: an image's bytes then come from Glance.  core/diskstate.py decides, probes lead back.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import trio

from lazyimg.core.diskstate import DiskState, State
from lazyimg.errors import CacheUnusable, ChunkUnreadable

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

# Looked for what hangs, and for what to probe, so often within `disk_timeout`, and at least once a second.
WATCHES_PER_TIMEOUT = 10
WATCH_INTERVAL_MAX_S = 1


@dataclass(frozen=True, slots=True)
class DiskStatistics:
    """A snapshot; counted since the daemon started.

    state_age_s: since when it is in this state.  stuck_operations: those that take longer than `disk_timeout` now.
    bypassed_bytes: read from Glance since the disk did not give them.
    """

    state: State
    state_age_s: float
    is_read_only: bool
    errors: int
    last_error: str | None
    stuck_operations: int
    bypassed_bytes: int


@dataclass(eq=False, slots=True)
class _Operation:
    """One that somebody waits for, or that is left alone in its thread."""

    name: str
    asked_s: float
    began_s: float | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)


class DiskHealth:
    """One disk, for all images.  Used on the event loop alone, but for the bookkeeping of its threads."""

    def __init__(
        self,
        path: Path,
        probe: Callable[[], None],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin with a disk that is well.

        path: for messages.  probe: writes, syncs and reads a small file on the disk; blocks; raises OSError.
        clock: of real time, since threads of a disk do not heed the event loop's.
        """
        self._path = path
        self._probe = probe
        self._timeout_s = timeout_s
        self._clock = clock
        self._state = DiskState(clock())
        self._bypassed_bytes = 0
        # Asked for by somebody who waits.
        self._awaited: set[_Operation] = set()
        # In a thread, awaited or left alone.  Changed by those threads.
        self._running: set[_Operation] = set()
        self._running_lock = threading.Lock()
        # Of blocks that end when the disk is used again.
        self._until_back: set[trio.CancelScope] = set()
        self._probing = trio.CapacityLimiter(1)
        # Set and replaced whenever the state has changed.
        self._changed = trio.Event()

    @property
    def is_normal(self) -> bool:
        return self._state.state == "normal"

    @property
    def may_read(self) -> bool:
        return self._state.may_read

    @property
    def may_write(self) -> bool:
        return self._state.may_write

    def statistics(self) -> DiskStatistics:
        """Return a snapshot of the disk's state and counters."""
        state, now_s = self._state, self._clock()
        return DiskStatistics(
            state.state,
            now_s - state.since_s,
            state.is_read_only,
            state.errors_count,
            state.last_error,
            sum(self._is_stuck(operation, now_s) for operation in self._in_threads()),
            self._bypassed_bytes,
        )

    def bypass(self, reason: str) -> None:
        """Use the disk no more until a probe succeeds."""
        with self._changing():
            self._state.hung(self._clock(), reason)

    def note_bypassed(self, size_bytes: int) -> None:
        """So many bytes went to a guest past the disk."""
        self._bypassed_bytes += size_bytes

    async def read(self, function: Callable[..., _T], *args: object, limiter: trio.CapacityLimiter) -> _T:
        """Call a function that reads the disk in a thread; cancellation leaves that alone.

        Raises what the function does; OSError(ETIMEDOUT) where the disk is not used or does not answer in time.
        """
        if not self.may_read:
            raise self._unused()
        return await self._run(_Operation(function.__name__, self._clock()), function, args, limiter)

    async def write(self, function: Callable[..., _T], *args: object, limiter: trio.CapacityLimiter) -> _T:
        """Call a function that changes the disk in a thread; it ends before a cancellation does.

        Raises what the function does; OSError(ETIMEDOUT), or EROFS, where the disk is not used or does not answer
        in time: the function may still be done then, and will be before any other begins.
        """
        if not self.may_write:
            raise self._unused()
        operation = _Operation(function.__name__, self._clock())
        operation.scope.shield = True
        return await self._run(operation, function, args, limiter)

    async def wait_normal(self, *, normal: bool = True) -> None:
        """Wait until nothing is wrong with the disk; normal: False, until something is."""
        while self.is_normal is not normal:
            await self._changed.wait()

    def check_normal(self) -> None:
        """Raise CacheUnusable if something is wrong with the disk."""
        if not self.is_normal:
            state = self._state
            raise CacheUnusable(
                f"cache disk {self._path}: its state is {state.state}, {state.last_error}; see dmesg and run it again "
                "once `lazyimg status` says that it is normal"
            )

    async def still_answers(self) -> bool:
        """Return False if the disk hangs; asked before an end that would wait for it."""
        if not self.may_read and self._in_threads():
            return False
        operation = _Operation("probe", self._clock())
        try:
            await self._run(operation, self._probe, (), self._probing, is_probe=True)
        except OSError:
            return not operation.scope.cancel_called
        return True

    @contextmanager
    def until_back(self) -> Iterator[None]:
        """Leave the block when the disk, bypassed at its begin, is used again."""
        with trio.CancelScope() as scope:
            if not self.may_read:
                self._until_back.add(scope)
            try:
                yield
            finally:
                self._until_back.discard(scope)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Look for what hangs, and probe what failed, while the block runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, nursery)
            yield
            nursery.cancel_scope.cancel()

    async def _watch(self, nursery: trio.Nursery) -> None:
        interval_s = min(self._timeout_s / WATCHES_PER_TIMEOUT, WATCH_INTERVAL_MAX_S)
        while True:
            try:
                self.look(nursery)
            except Exception:
                logger.exception("looking after the cache disk failed in an unforeseen way")
            await trio.sleep(interval_s)

    def look(self, nursery: trio.Nursery) -> None:
        """Look once; a probe that is due is made in the nursery."""
        now_s = self._clock()
        for operation in self._in_threads():
            if self._is_stuck(operation, now_s):
                with self._changing():
                    self._state.hung(now_s, f"{operation.name} takes longer than {self._timeout_s:g} s")
                operation.scope.cancel()
        for operation in self._awaited:
            # Threads that are all busy are no fault of the disk's, but no reason to wait for ever either.
            if now_s - operation.asked_s > self._timeout_s:
                operation.scope.cancel()
        probe_at_s = self._state.probe_at()
        if probe_at_s is None or now_s < probe_at_s or self._probing.borrowed_tokens:
            return
        # A disk on which something still hangs has not come back.
        if self.may_read or not self._in_threads():
            nursery.start_soon(self._probe_once)

    async def _probe_once(self) -> None:
        operation = _Operation("probe", self._clock())
        try:
            await self._run(operation, self._probe, (), self._probing, is_probe=True)
        except OSError as exc:
            if not operation.scope.cancel_called:
                with self._changing():
                    self._state.probe_failed(self._clock(), exc.errno or errno.EIO, _text_of(exc))
        except Exception as exc:
            logger.exception("probing the cache disk failed in an unforeseen way")
            with self._changing():
                self._state.probe_failed(self._clock(), errno.EIO, repr(exc))
        else:
            with self._changing():
                self._state.probe_succeeded(self._clock())

    async def _run(
        self,
        operation: _Operation,
        function: Callable[..., _T],
        args: tuple[object, ...],
        limiter: trio.CapacityLimiter,
        *,
        is_probe: bool = False,
    ) -> _T:
        def call() -> _T:
            with self._running_lock:
                operation.began_s = self._clock()
                self._running.add(operation)
            try:
                return function(*args)
            finally:
                with self._running_lock:
                    self._running.discard(operation)

        self._awaited.add(operation)
        try:
            with operation.scope:
                return await trio.to_thread.run_sync(call, limiter=limiter, abandon_on_cancel=True)
        except (OSError, ChunkUnreadable) as exc:
            cause = exc.__cause__ if isinstance(exc, ChunkUnreadable) else exc
            if not is_probe and isinstance(cause, OSError):
                with self._changing():
                    self._state.failed(self._clock(), cause.errno or 0, _text_of(cause))
            raise
        finally:
            self._awaited.discard(operation)
        raise OSError(
            errno.ETIMEDOUT,
            f"cache disk {self._path}: no answer to {operation.name} within {self._timeout_s:g} s",
        )

    def _in_threads(self) -> list[_Operation]:
        with self._running_lock:
            return list(self._running)

    def _is_stuck(self, operation: _Operation, now_s: float) -> bool:
        return operation.began_s is not None and now_s - operation.began_s > self._timeout_s

    def _unused(self) -> OSError:
        if self.may_read:
            return OSError(errno.EROFS, f"cache disk {self._path}: read-only, not written until it can be")
        return OSError(errno.ETIMEDOUT, f"cache disk {self._path}: bypassed since {self._state.last_error}")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Do, and say once, what follows from a change of state."""
        before = self._state.state, self._state.is_read_only
        yield
        state, is_read_only = after = self._state.state, self._state.is_read_only
        if after == before:
            return
        self._changed.set()
        self._changed = trio.Event()
        reason = f"cache disk {self._path}: {self._state.last_error}"
        match state:
            case "bypass":
                logger.warning(
                    "%s; not used from here on, guests are served from Glance until it is back", reason
                )
                for operation in self._awaited:
                    operation.scope.cancel()
            case "unstable" if is_read_only:
                logger.warning("%s; read and not written until it can be", reason)
            case "unstable":
                logger.warning("%s; used on and watched", reason)
            case "normal":
                logger.info("cache disk %s: normal again", self._path)
        if self.may_read:
            for scope in self._until_back:
                scope.cancel()


def _text_of(error: OSError) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)
