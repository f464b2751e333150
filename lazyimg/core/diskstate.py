"""Whether the cache's disk may be used: what its failures make of it, and when it is probed.

Pure: no I/O and no clock; times are passed in, in seconds of any one clock that never goes back.

                    first error                    errors_max within window, or an operation that hangs
        NORMAL ──────────────────────► UNSTABLE ──────────────────────────────────────────► BYPASS
           ▲                            │    ▲                                                │
           └── GOOD_PROBES in a row ────┘    └───────────────── one good probe ───────────────┘

normal, unstable: read and written; a read-only disk is unstable and not written.  bypass: not touched but by probes.
A full disk is not a failing one and never comes here.
"""

from __future__ import annotations

import errno
from collections import deque
from typing import Literal

State = Literal["normal", "unstable", "bypass"]

# So many errors within so long are the disk's and not those of a few bad sectors.
ERRORS_MAX = 3
ERRORS_WINDOW_S = 60
# Good probes in a row, and no error between them, that make an unstable disk a normal one.
GOOD_PROBES = 3
PROBE_PAUSE_S = 1
# Between probes of a disk that stays bad; they are cheap, and a guest reads from far away meanwhile.
PROBE_PAUSE_MAX_S = 15

# What a disk that fails, vanishes or went away behind a network says.  Others are said of a name, a limit of this
# process or a full disk, which is the business of image/space.py.
FAULTS = frozenset(
    {
        errno.EIO,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOMEDIUM,
        errno.EREMOTEIO,
        errno.EUCLEAN,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.ESHUTDOWN,
        errno.EHOSTDOWN,
        errno.ENOLINK,
    }
)


class DiskState:
    """The state of one disk."""

    def __init__(self, now_s: float) -> None:
        self.state: State = "normal"
        self.since_s = now_s
        self.is_read_only = False
        self.errors_count = 0
        self.last_error: str | None = None
        self._errors_at: deque[float] = deque(maxlen=ERRORS_MAX)
        self._good_probes = 0
        self._probe_pause_s: float = PROBE_PAUSE_S
        self._probe_at_s = now_s

    @property
    def may_read(self) -> bool:
        return self.state != "bypass"

    @property
    def may_write(self) -> bool:
        return self.state != "bypass" and not self.is_read_only

    def probe_at(self) -> float | None:
        """Return when to probe next; None while nothing is wrong."""
        return None if self.state == "normal" else self._probe_at_s

    def failed(self, now_s: float, number: int, text: str) -> None:
        """Note that an operation ended with this errno, described by `text`."""
        if number == errno.EROFS:
            self._note_error(text)
            self.is_read_only = True
        elif number in FAULTS:
            self._note_error(text)
            # What was begun before a bypass and ends in it says nothing new.
            if self.state != "bypass":
                self._errors_at.append(now_s)
        else:
            return
        if len(self._errors_at) == ERRORS_MAX and now_s - self._errors_at[0] <= ERRORS_WINDOW_S:
            self._enter("bypass", now_s)
        elif self.state == "normal":
            self._enter("unstable", now_s)

    def hung(self, now_s: float, text: str) -> None:
        """Note that an operation takes longer than any should."""
        self._note_error(text)
        if self.state != "bypass":
            self._enter("bypass", now_s)

    def probe_succeeded(self, now_s: float) -> None:
        """Note that a small file could be written, synced and read."""
        self.is_read_only = False
        if self.state == "bypass":
            self._enter("unstable", now_s)
        self._good_probes += 1
        if self._good_probes >= GOOD_PROBES:
            self._enter("normal", now_s)
        self._probe_at_s = now_s + PROBE_PAUSE_S

    def probe_failed(self, now_s: float, number: int, text: str) -> None:
        """Note that it could not; a disk that is only read-only may be read."""
        if number == errno.EROFS and self.state == "bypass":
            self._enter("unstable", now_s)
        self.failed(now_s, number, text)
        self._good_probes = 0
        self._probe_pause_s = min(self._probe_pause_s * 2, PROBE_PAUSE_MAX_S)
        self._probe_at_s = now_s + self._probe_pause_s

    def _note_error(self, text: str) -> None:
        self.errors_count += 1
        self.last_error = text
        self._good_probes = 0

    def _enter(self, state: State, now_s: float) -> None:
        self.state = state
        self.since_s = now_s
        self._good_probes = 0
        if state != "unstable":
            self._errors_at.clear()
        self._probe_pause_s = PROBE_PAUSE_S
        self._probe_at_s = now_s + PROBE_PAUSE_S
