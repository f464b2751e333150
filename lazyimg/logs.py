"""How log lines leave a process: one line a message, and no flood of one kind.

A fault of Glance or of a disk befalls every read at once, and each would say so: of one message (the same logger,
level and template) a burst is told, then only how many more there were.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

# Lines of one message in a window; the rest are counted.  A window begins with its first line.
BURST_LINES = 20
WINDOW_S = 60.0
# Messages told apart; those of libraries may be put together without a template, each one new.
MESSAGES_MAX = 1000
# What somebody asked for, such as a dump, is bounded by who writes it: `extra=UNLIMITED`.
UNLIMITED = {"is_unlimited": True}

ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
# Logger, level and template; an empty template stands for all that are more than MESSAGES_MAX.
Message = tuple[str, int, str]


def set_up_logging(level: str) -> LimitedHandler:
    """Log to standard error from `level` on; under systemd the journal adds the time itself."""
    handler = LimitedHandler(sys.stderr)
    when = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    handler.setFormatter(OneLine(f"{when}%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    return handler


def escaped(text: str) -> str:
    r"""Return text on one line: what cannot be printed, a line's end or a terminal's command, as \n or \x1b.

    Names and messages come from other people.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class OneLine(logging.Formatter):
    """One line a message; only a traceback has more, each without control characters."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = escaped(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: ExcInfo) -> str:
        return "\n".join(map(escaped, super().formatException(ei).split("\n")))


class LimitedHandler(logging.StreamHandler[TextIO]):
    """Writes what its limit admits; `tell_left_out` says, now and then, how much it did not."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream)
        self._clock = clock
        self._limit = RateLimit()

    def emit(self, record: logging.LogRecord) -> None:
        # Called with the handler's lock held.
        now_s = self._clock()
        self._tell_left_out(now_s)
        is_limited = record.levelno >= logging.INFO and not hasattr(record, "is_unlimited")
        if not is_limited or self._limit.admits((record.name, record.levelno, str(record.msg)), now_s):
            super().emit(record)

    def tell_left_out(self) -> None:
        """Write what was left out in the windows that are over."""
        self.acquire()
        try:
            self._tell_left_out(self._clock())
        finally:
            self.release()

    def _tell_left_out(self, now_s: float) -> None:
        for (name, level, template), count in self._limit.ended(now_s):
            text = (
                "%d more like this within %g s: %s" if template else "%d more of other messages within %g s%s"
            )
            super().emit(
                logging.LogRecord(name, level, __file__, 0, text, (count, WINDOW_S, template), exc_info=None)
            )


class RateLimit:
    """Which messages are told.  Pure: times are given."""

    def __init__(self) -> None:
        # When a message's window ends, and how often it came; in the order of their begin, which is that of their end.
        self._windows: dict[Message, tuple[float, int]] = {}

    def admits(self, message: Message, now_s: float) -> bool:
        """Note a message and return whether it is told; call `ended` before."""
        if message not in self._windows and len(self._windows) >= MESSAGES_MAX:
            message = (message[0], message[1], "")
        end_s, count = self._windows.get(message, (now_s + WINDOW_S, 0))
        self._windows[message] = end_s, count + 1
        return count < BURST_LINES

    def ended(self, now_s: float) -> list[tuple[Message, int]]:
        """Return the messages of which some were left out in a window that is over, with their number; once each."""
        left_out = []
        for message, (end_s, count) in list(self._windows.items()):
            if end_s > now_s:
                break
            del self._windows[message]
            if count > BURST_LINES:
                left_out.append((message, count - BURST_LINES))
        return left_out
