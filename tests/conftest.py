"""What every test may rely on: named skips, announced warnings, and nothing left behind.

Temporary files of the tests and of the processes they start are below pytest's own folder, and those
processes carry a mark in their environment: what is left is found exactly, other sessions beside us or not.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Not LAZYIMG_…: such a variable would be taken for a configuration key.
SESSION_VARIABLE = "PYTEST_SESSION_OF_LAZYIMG"


@pytest.fixture(scope="session")
def require() -> Callable[..., None]:
    """Return `require(*names)`: skips with the name of the first program or device that is missing.

    A name with a slash is a device that must open for reading and writing, any other a program on PATH.
    """

    def require(*names: str) -> None:
        for name in names:
            if not _is_there(name):
                pytest.skip(f"{name} is missing here; `make setup` installs what can be installed")

    return require


def _is_there(name: str) -> bool:
    if "/" not in name:
        # The mke2fs family lives in sbin, which is not on every user's PATH.
        return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is not None
    try:
        os.close(os.open(name, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for tests that make a great many files durable."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="lazyimg-test-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def expected_warnings() -> Iterator[Callable[..., None]]:
    """Return `expected_warnings(*patterns, required=True)`: announces the warnings and errors a test logs.

    A test that logs a warning on `lazyimg…` it did not announce fails, and so does one whose required warning
    did not come.  A pattern is a regular expression searched in "LEVEL logger: message".
    """
    announced: dict[str, bool] = {}

    def announce(*patterns: str, required: bool = True) -> None:
        announced.update(dict.fromkeys(patterns, required))

    handler = _Warnings()
    logger = logging.getLogger("lazyimg")
    logger.addHandler(handler)
    try:
        yield announce
    finally:
        logger.removeHandler(handler)
    surprises = [m for m in handler.messages if not any(re.search(p, m) for p in announced)]
    assert not surprises, "warnings that the test did not announce with expected_warnings"
    missing = [p for p, required in announced.items() if required and not _found(p, handler.messages)]
    assert not missing, "warnings that the test announced and that did not come"


def _found(pattern: str, messages: list[str]) -> bool:
    return any(re.search(pattern, message) for message in messages)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session if it leaves a mount below its folder or a process that it started; end both."""
    base = tmp_path_factory.getbasetemp()
    mark = f"{SESSION_VARIABLE}={uuid.uuid4()}"
    temp_dir = base / "tmp"
    temp_dir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(*mark.split("=", 1))
        patch.setenv("TMPDIR", str(temp_dir))
        patch.setattr(tempfile, "tempdir", str(temp_dir))
        yield
    mounts, processes = _mounts_below(base), _processes_with(mark)
    for mount in mounts:
        subprocess.run(["umount", "--lazy", mount], check=False)
    for pid in processes:
        # It may have ended by itself since it was listed.
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    assert not mounts, "mounts left behind by the tests"
    assert not processes, "processes left behind by the tests"


def _mounts_below(folder: Path) -> list[str]:
    # proc(5), /proc/pid/mounts: blanks in a path are written as octal escapes.
    paths = [
        line.split(" ")[1].encode().decode("unicode_escape")
        for line in Path("/proc/self/mounts").read_text().splitlines()
    ]
    return [path for path in reversed(paths) if Path(path).is_relative_to(folder)]


def _processes_with(mark: str) -> dict[int, str]:
    """Return pid and command of each living process but this one that has the mark in its environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            # Ended meanwhile, or another user's: not ours.
            continue
        if mark.encode() in environment and int(process.name) != os.getpid():
            found[int(process.name)] = command
    return found
