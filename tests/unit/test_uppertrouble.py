"""What the disk beneath the mount refuses is in the log, once in a while."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from lazyimg.daemon.uppertrouble import INTERVAL_S, UpperTrouble


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_full_disk_is_told_once_a_minute(
    caplog: pytest.LogCaptureFixture, expected_warnings: Callable[..., None]
) -> None:
    """[I5] However many writes a full disk refuses, the log says so once a minute, and of each errno."""
    expected_warnings("the folder beneath the mount")
    now = [0.0]
    trouble = UpperTrouble(lambda: now[0])
    for _ in range(100):
        trouble.note("write", error(errno.ENOSPC))
    trouble.note("create", error(errno.EROFS))
    now[0] += INTERVAL_S
    trouble.note("write", error(errno.ENOSPC))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[0] == "the folder beneath the mount: write: No space left on device; see to its disk"


def test_errors_of_the_callers_own_are_not_told() -> None:
    """A name that is not there, or taken, is nobody's trouble."""
    trouble = UpperTrouble()
    for number in (errno.ENOENT, errno.EEXIST, errno.EACCES, errno.ENOTEMPTY, errno.ESTALE):
        trouble.note("create", error(number))
