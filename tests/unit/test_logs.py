"""Log lines: one a message, and no flood of one kind."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from lazyimg.logs import (
    BURST_LINES,
    MESSAGES_MAX,
    UNLIMITED,
    WINDOW_S,
    LimitedHandler,
    OneLine,
    RateLimit,
    escaped,
)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def handler(clock: Clock) -> LimitedHandler:
    handler = LimitedHandler(io.StringIO(), clock=clock)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    return handler


@pytest.fixture
def log(handler: LimitedHandler) -> Iterator[logging.Logger]:
    # Not below "lazyimg": these warnings are the test's own.
    log = logging.getLogger("storm")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(handler)
    yield log
    log.removeHandler(handler)


def written(handler: LimitedHandler) -> list[str]:
    """Return the lines so far."""
    assert isinstance(handler.stream, io.StringIO)
    return handler.stream.getvalue().splitlines()


def test_storm_is_cut_and_counted(log: logging.Logger, handler: LimitedHandler, clock: Clock) -> None:
    """[I5] Of one message a burst is told, then, with the next line after the window, how many more there were."""
    for number in range(500):
        log.warning("read %d failed", number)
    assert written(handler) == [f"WARNING storm: read {number} failed" for number in range(BURST_LINES)]
    clock.now_s = WINDOW_S + 1
    log.info("something else")
    assert written(handler)[BURST_LINES:] == [
        f"WARNING storm: {500 - BURST_LINES} more like this within 60 s: read %d failed",
        "INFO storm: something else",
    ]


def test_storm_that_ended_in_silence_is_counted(
    log: logging.Logger, handler: LimitedHandler, clock: Clock
) -> None:
    """When nothing else is logged, what was left out is told on request, once, and not before the window is over."""
    for _ in range(BURST_LINES + 3):
        log.error("no")
    handler.tell_left_out()
    assert len(written(handler)) == BURST_LINES
    clock.now_s = WINDOW_S
    handler.tell_left_out()
    handler.tell_left_out()
    assert written(handler)[BURST_LINES:] == ["ERROR storm: 3 more like this within 60 s: no"]


def test_messages_are_limited_apart(log: logging.Logger, handler: LimitedHandler) -> None:
    """A storm of one message leaves out no other, nor the same at another level."""
    for _ in range(100):
        log.warning("one")
    log.warning("two")
    log.error("one")
    assert written(handler)[-2:] == ["WARNING storm: two", "ERROR storm: one"]


def test_few_lines_are_all_told(log: logging.Logger, handler: LimitedHandler, clock: Clock) -> None:
    """What comes now and then is never left out."""
    for number in range(100):
        clock.now_s = number * (WINDOW_S / BURST_LINES)
        log.warning("now and then")
    assert len(written(handler)) == 100


def test_what_is_asked_for_is_not_limited(log: logging.Logger, handler: LimitedHandler) -> None:
    """A dump, and DEBUG, which nobody has on by accident, are told in full."""
    for _ in range(100):
        log.warning("line", extra=UNLIMITED)
        log.debug("line")
    assert len(written(handler)) == 200


def test_messages_told_apart_are_bounded() -> None:
    """[I5] Messages put together without a template are limited together once there are too many."""
    limit = RateLimit()
    told = sum(limit.admits(("x", logging.INFO, str(number)), 0.0) for number in range(5 * MESSAGES_MAX))
    assert told == MESSAGES_MAX + BURST_LINES
    assert limit.ended(WINDOW_S) == [(("x", logging.INFO, ""), 4 * MESSAGES_MAX - BURST_LINES)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ü€", "plain ü€"),
        ("a\nERROR forged", "a\\nERROR forged"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\u202eback\x00", "\\u202eback\\x00"),
        ("a\\nb", "a\\nb"),
    ],
)
def test_what_cannot_be_printed_is_escaped_once(text: str, expected: str) -> None:
    """A name from Glance can neither forge a line nor command a terminal; what is escaped already stays."""
    assert escaped(text) == expected
    assert escaped(expected) == expected


def test_hostile_name_is_one_line(log: logging.Logger, handler: LimitedHandler) -> None:
    """The message is escaped, and so is each line of a traceback that quotes it."""
    try:
        raise ValueError("a\x1b[2J")
    except ValueError:
        log.exception("image %s: refused", "x\nERROR storm: forged")
    lines = written(handler)
    assert lines[0] == "ERROR storm: image x\\nERROR storm: forged: refused"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: a\\x1b[2J"
