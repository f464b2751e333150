"""What a torturing process counts, in memory it shares with who watches it.

Each field is eight bytes in a file that both map: a process that hangs in a read, or was killed, has still said
all it did and since when it waits.
"""

from __future__ import annotations

import fcntl
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


class Count(IntEnum):
    """Place of each number in the file."""

    READS = 0  # reads of images that ended, each one checked
    BYTES = 1  # bytes of images compared with what they must be
    CHANGES = 2  # operations on upper files that ended
    WRONG = 3  # reads, of images or upper files, that did not give what is there
    FAILED = 4  # operations that failed though they could have waited
    NOT_NOW = 5  # names that were undecided when they were opened, and opened again
    DOUBTED = 6  # changes of a name that were done and reported failed
    SINCE_NS = 7  # monotonic time when the operation under way began; 0: none is
    IS_ENDING = 8  # written by who watches: end after this operation
    LONGEST_NS = 9  # the longest operation that ended


FILE_BYTES = mmap.PAGESIZE
# Of one process; what is wrong with the first ones is wrong with the rest.
COMPLAINTS_MAX = 20


class Tally:
    """One process's numbers; made by who watches, written by the process."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(FILE_BYTES))
        with path.open("r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), FILE_BYTES)).cast("Q")
        self._complaints = 0

    def __getitem__(self, count: Count) -> int:
        return self._numbers[count]

    def add(self, count: Count, number: int = 1) -> None:
        """Count something."""
        self._numbers[count] += number

    def complain(self, count: Count, words: str) -> None:
        """Count something that should not have been, and say what it was."""
        self.add(count)
        self._complaints += 1
        if self._complaints <= COMPLAINTS_MAX:
            print(f"{time.strftime('%H:%M:%S')} {self.name}: {count.name.lower()}: {words}", flush=True)

    @property
    def is_ending(self) -> bool:
        """True when the process is to end."""
        return bool(self._numbers[Count.IS_ENDING])

    def end(self) -> None:
        """Let the process end after the operation it is at."""
        self._numbers[Count.IS_ENDING] = 1

    def waited_s(self) -> float:
        """Return how long the operation under way has taken; 0 if there is none."""
        since_ns = self._numbers[Count.SINCE_NS]
        return (time.monotonic_ns() - since_ns) / 1e9 if since_ns else 0.0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Note that an operation is under way in the block."""
        began_ns = time.monotonic_ns()
        self._numbers[Count.SINCE_NS] = began_ns
        try:
            yield
        finally:
            took_ns = time.monotonic_ns() - began_ns
            self._numbers[Count.LONGEST_NS] = max(self._numbers[Count.LONGEST_NS], took_ns)
            self._numbers[Count.SINCE_NS] = 0


class Gate:
    """Lets who evicts an image wait until nobody has it open, and nobody open it meanwhile.

    Two locks, so that readers who come all the time do not keep the other out for ever: he who waits for `gate`
    holds `turnstile`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the image open in the block, with others."""
        with self._locked("turnstile", fcntl.LOCK_EX):
            gate = self._locked("gate", fcntl.LOCK_SH)
            gate.__enter__()
        try:
            yield
        finally:
            gate.__exit__(None, None, None)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Let nobody have the image open in the block."""
        with self._locked("turnstile", fcntl.LOCK_EX), self._locked("gate", fcntl.LOCK_EX):
            yield

    @contextmanager
    def _locked(self, name: str, how: int) -> Iterator[None]:
        with self._path.with_suffix(f".{name}").open("w") as file:
            fcntl.flock(file, how)
            yield
