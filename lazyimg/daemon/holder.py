"""The small process that keeps /dev/fuse: it mounts, starts the daemon, and replaces it when it dies or shall.

It holds what a daemon needs to go on where the last one stopped: the FUSE descriptor, the kernel's INIT request,
the upper folder, the counts of handles and the descriptors of open files.  It knows neither Glance nor the cache,
and never touches a path under the mount (I11).

    mount ──► answer INIT ──► daemon starts ──READY──► serves ──exit 0──► unmounted: end
                                 ▲    │ dies before READY     │ dies
                                 │    ▼ the first time: end   │
                                 └── pause ◄──────────────────┘

    planned: another is started ──PREPARED──► the old one drains and ends ──► the other gets the descriptors, serves
                                  └─ fails, or not in time ──► it ends, the old one goes on
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import selectors
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from lazyimg.config import Config
from lazyimg.daemon import handles, handshake, mountpoint
from lazyimg.daemon.daemonprocess import DaemonProcess, is_reaped
from lazyimg.daemon.fdstore import KeptFds, store
from lazyimg.daemon.handover import (
    DRAIN,
    FAILED,
    GOES_ON,
    KEPT,
    PREPARED,
    RESTART,
    TAKEN_UP,
    YIELDED,
    ConfigSource,
    Handover,
)
from lazyimg.daemon.notify import notify, receive
from lazyimg.daemon.spawn import SIGNALS, listened_fds, signals_as_bytes, take_signals
from lazyimg.errors import LazyImgError
from lazyimg.logs import set_up_logging

logger = logging.getLogger("lazyimg.daemon.holder")

# Pauses between daemons that die before they are ready; one that was ready is replaced at once.
RESTART_PAUSE_MIN_S = 0.1
RESTART_PAUSE_MAX_S = 5.0
# A daemon that dies so soon after it was asked to unmount has not done it; one that refused has said so by then.
ASKED_LATELY_S = 5.0
# A daemon whose end hangs is looked for this often.
LOOK_INTERVAL_S = 0.5


def run_mount(config: Config, source: ConfigSource, where: Path) -> int:
    """Mount at `where`, or take up the mount that systemd kept, and serve until it is unmounted.

    Returns the exit code.  Raises InUse or MountFailed, with nothing left mounted.
    """
    raise_fd_limit()
    given = listened_fds()
    where = Path(os.path.abspath(where))
    if {*KEPT, "handover"} <= given.keys() and not handshake.is_gone(given["fuse"]):
        handover = replace(Handover.from_memory(given["handover"]), config=config, source=source)
        logger.info("taking up the mount %s", handover.mountpoint)
        _end_other_daemon(config.control)
        return Holder.of(given, handover).run()
    # Those of a mount that has ended since.
    for name, fd in given.items():
        notify(f"FDSTOREREMOVE=1\nFDNAME={name}")
        os.close(fd)
    mountpoint.check_mountpoint(where)
    upper_fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fuse_fd = mountpoint.mount(where, allow_other=config.allow_other)
    fds = {"fuse": fuse_fd, "upper": upper_fd, "handles": handles.make_table()}
    try:
        init_request, init_answer = handshake.open_session(fuse_fd)
        _raise_read_ahead(where, config.read_ahead)
    except BaseException:
        os.close(fuse_fd)
        _detach(where)
        raise
    handover = Handover(config, source, where, init_request, init_answer)
    _store_with_manager(fds, handover)
    return Holder(fds, KeptFds(), handover).run()


def main() -> int:
    """Take over from a holder that died: the daemon itself started this one."""
    given = listened_fds()
    handover = Handover.from_memory(given["handover"])
    set_up_logging(handover.config.log_level)
    return Holder.of(given, handover).run()


class Holder:
    """The loop around the daemon.  All descriptors it is given are its own."""

    def __init__(
        self, fds: dict[str, int], kept: KeptFds, handover: Handover, daemon: DaemonProcess | None = None
    ) -> None:
        self._fds = fds
        self._kept = kept
        self._handover = replace(
            handover,
            holder_pid=os.getpid(),
            manager=os.environ.get("NOTIFY_SOCKET", ""),
            is_planned=False,
            is_last_dying=False,
        )
        self._selector = selectors.DefaultSelector()
        # The one that serves, and in a planned hand-over the one that shall.
        self._daemon = daemon
        self._next: DaemonProcess | None = None
        self._is_taken_up = False
        self._was_ever_ready = daemon is not None
        self._pause_s = 0.0
        # When a daemon is started that waits for its pause, and when a planned one has had its time.
        self._start_at_s: float | None = None
        self._give_up_at_s: float | None = None
        self._exit_code: int | None = None
        # Processes of daemons that have ended but for a thread that waits for a disk.
        self._dying: list[int] = []
        self._asked_to_end_at_s = float("-inf")

    @classmethod
    def of(cls, given: dict[str, int], handover: Handover) -> Holder:
        """Return the holder of a mount that is in use; with "daemon" among `given`, of one whose daemon lives."""
        fds = {name: given[name] for name in KEPT}
        mine = {*KEPT, "handover", "daemon", "orders", "notify"}
        kept = KeptFds({name: fd for name, fd in given.items() if name not in mine})
        daemon = None
        if "daemon" in given:
            daemon = DaemonProcess.adopted(given["daemon"], given["orders"], given["notify"])
        holder = cls(fds, kept, handover, daemon)
        holder._was_ever_ready = True
        return holder

    def run(self) -> int:
        """Keep a daemon running until one ends well, or the first one does not become ready."""
        try:
            with signals_as_bytes() as signals:
                take_signals(*SIGNALS)
                self._watch(signals.fileno(), lambda: self._signalled(signals.recv(64)))
                if self._daemon is None:
                    self._start()
                else:
                    self._watch_daemon(self._daemon)
                    # Some were opened while there was no holder to pass them on; systemd knows which it has already.
                    for name, fd in self._kept.all().items():
                        store(name, fd)
                    notify(f"MAINPID={os.getpid()}\nREADY=1")
                    self._daemon.order(TAKEN_UP)
                while self._exit_code is None:
                    self._run_once()
                return self._exit_code
        finally:
            self._end()

    def _run_once(self) -> None:
        times = [at_s for at_s in (self._start_at_s, self._give_up_at_s) if at_s is not None]
        timeout_s = min([LOOK_INTERVAL_S, *(max(0.0, at_s - time.monotonic()) for at_s in times)])
        for key, _ in self._selector.select(timeout_s):
            # One that an earlier one of these has ended is not looked at, nor who has its number now.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        self._look_for_dying()
        now_s = time.monotonic()
        if self._start_at_s is not None and self._start_at_s <= now_s:
            self._start()
        if self._give_up_at_s is not None and self._give_up_at_s <= now_s:
            self._give_up(
                f"the other daemon was not ready within {self._handover.config.restart_timeout:g} s"
            )

    def _end(self) -> None:
        """Close everything; closing the last descriptor aborts what is left of the connection."""
        self._selector.close()
        self._kept.close()
        for fd in self._fds.values():
            os.close(fd)
        if self._daemon is None and not self._is_taken_up:
            _detach(self._handover.mountpoint)

    # ── daemons ──

    def _start(self) -> None:
        self._start_at_s = None
        handover = replace(self._handover, is_last_dying=bool(self._dying))
        self._daemon = DaemonProcess.start(self._fds, handover)
        self._watch_daemon(self._daemon)
        self._hand_over_to(self._daemon)

    def _hand_over_to(self, daemon: DaemonProcess) -> None:
        try:
            daemon.hand_over(self._kept.all())
        except OSError as exc:
            # It ends for want of them, and is replaced.
            logger.error("daemon %d did not take the open files: %s", daemon.pid, exc)
            daemon.kill()

    def _look_for_dying(self) -> None:
        for daemon in (self._daemon, self._next):
            code = None if daemon is None else daemon.code_if_dying()
            if daemon is not None and code is not None:
                logger.error("daemon %d has ended, but for what hangs, on a disk most likely", daemon.pid)
                self._dying.append(daemon.pid)
                self._ended(daemon, code)
        self._dying = [pid for pid in self._dying if not is_reaped(pid)]

    def _ended(self, daemon: DaemonProcess, code: int) -> None:
        # What it said last comes before its end.
        self._notified(daemon)
        for fd in daemon.fds:
            self._selector.unregister(fd)
        daemon.close()
        if daemon is self._next:
            self._next = None
            self._give_up(daemon.failure or f"the other daemon ended with {code}; see the log")
        elif daemon is self._daemon:
            self._daemon = None
            self._go_on_without(daemon, code)

    def _go_on_without(self, daemon: DaemonProcess, code: int) -> None:
        if daemon.has_yielded:
            self._is_taken_up, self._exit_code = True, 0
        elif not self._was_ever_ready or handshake.is_gone(self._fds["fuse"]):
            # As a shell would say it.
            self._exit_code = code if code >= 0 else 128 - code
        elif self._next is None:
            self._replace(daemon, code)
        elif self._next.is_prepared:
            self._take_next()

    def _replace(self, daemon: DaemonProcess, code: int) -> None:
        if daemon.is_ready:
            self._pause_s = 0.0
        logger.error("daemon %d ended with %d; starting another in %.1f s", daemon.pid, code, self._pause_s)
        now_s = time.monotonic()
        if now_s - self._asked_to_end_at_s < ASKED_LATELY_S:
            self._unmount()
            if self._exit_code is not None:
                return
        self._start_at_s = now_s + self._pause_s
        self._pause_s = min(max(RESTART_PAUSE_MIN_S, self._pause_s * 2), RESTART_PAUSE_MAX_S)

    # ── a planned hand-over ──

    def _restart(self) -> None:
        if self._next is not None or self._daemon is None:
            return
        self._next = DaemonProcess.start(self._fds, replace(self._handover, is_planned=True))
        self._watch_daemon(self._next)
        self._give_up_at_s = time.monotonic() + self._handover.config.restart_timeout

    def _take_next(self) -> None:
        """The old daemon has ended, the next one is prepared: it gets everything."""
        assert self._next is not None
        self._daemon, self._next, self._give_up_at_s = self._next, None, None
        self._hand_over_to(self._daemon)

    def _prepared(self, daemon: DaemonProcess, config_json: str) -> None:
        self._handover = self._handover.with_config(config_json)
        daemon.is_prepared = True
        # The old one gives up draining by itself, before that.
        self._give_up_at_s = time.monotonic() + 2 * self._handover.config.restart_timeout
        if self._daemon is None:
            self._take_next()
        else:
            self._daemon.order(DRAIN)

    def _give_up(self, reason: str) -> None:
        """The old daemon goes on; where it has died meanwhile, one is started as after every death."""
        self._give_up_at_s = None
        logger.error("not restarted: %s", reason)
        if self._next is not None:
            self._next.kill()
            # Its end, which is seen in its turn, means nothing any more.
            self._next = None
        if self._daemon is not None:
            self._daemon.order(reason)
        elif self._start_at_s is None:
            self._start_at_s = time.monotonic()

    # ── what it is told ──

    def _watch(self, fd: int, act: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, act)

    def _watch_daemon(self, daemon: DaemonProcess) -> None:
        pid_fd, listener_fd = daemon.fds
        self._watch(pid_fd, lambda: self._ended(daemon, daemon.reap()))
        self._watch(listener_fd, lambda: self._notified(daemon))

    def _notified(self, daemon: DaemonProcess) -> None:
        while (message := receive(daemon.listener)) is not None:
            variables, fds = message
            text = "\n".join(f"{name}={value}" for name, value in variables.items())
            if "FDSTORE" in variables or "FDSTOREREMOVE" in variables:
                # First on to systemd: `take` may close the descriptor.
                notify(text, fds)
            if self._kept.take(variables, fds):
                continue
            if variables.get("READY") == "1":
                daemon.is_ready = self._was_ever_ready = True
            if FAILED in variables:
                daemon.failure = variables[FAILED]
            elif YIELDED in variables:
                daemon.has_yielded = True
            elif RESTART in variables:
                self._restart()
            elif PREPARED in variables and daemon is self._next:
                self._prepared(daemon, variables[PREPARED])
            elif GOES_ON in variables:
                self._give_up(variables[GOES_ON])
            elif "BARRIER" not in variables:
                # The service's main process is this one, whichever daemon speaks.
                notify(text)

    def _signalled(self, numbers: bytes) -> None:
        for number in numbers:
            if self._daemon is not None and (self._daemon.is_ready or not self._was_ever_ready):
                self._daemon.signal(number)
                if number != signal.SIGUSR1:
                    self._asked_to_end_at_s = time.monotonic()
            elif number != signal.SIGUSR1:
                # Daemons that do not even start cannot be asked to unmount, nor for a dump.
                self._unmount()

    def _unmount(self) -> None:
        try:
            mountpoint.umount(self._handover.mountpoint)
        except LazyImgError as exc:
            logger.error("%s", exc)
            return
        if self._daemon is None:
            self._exit_code = 0


def _store_with_manager(fds: Mapping[str, int], handover: Handover) -> None:
    """Let systemd, where there is one, keep what its next start of this unit needs to take the mount up."""
    memory = handover.to_memory()
    for name, fd in {**fds, "handover": memory}.items():
        store(name, fd)
    os.close(memory)


def _end_other_daemon(control: Path) -> None:
    """Where only the holder died, its daemon and another holder have the mount: let them end, drained."""
    from lazyimg.control import ControlClient

    try:
        ControlClient(control).give_up_mount()
    except LazyImgError as exc:
        # It has the cache's lock, and ours is tried until that is free.
        logger.error("the daemon of before goes on: %s", exc)


def raise_fd_limit() -> None:
    """Let this process and its daemons have as many descriptors as they may: one for each open file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _detach(where: Path) -> None:
    """Take a mount that is dead by now out of the tree."""
    if mountpoint.mounted_type(where) == mountpoint.FILE_SYSTEM_TYPE:
        with contextlib.suppress(LazyImgError):
            mountpoint.detach(where)


def _raise_read_ahead(where: Path, size_bytes: int) -> None:
    """Let buffered reads of this mount be large; without it the kernel sends 128 KiB at a time."""
    device = mountpoint.device_of(where)
    try:
        Path(f"/sys/class/bdi/{device}/read_ahead_kb").write_text(str(size_bytes >> 10))
    except OSError as exc:
        logger.info("read-ahead of %s stays as it is: %s", where, exc)


if __name__ == "__main__":
    sys.exit(main())
