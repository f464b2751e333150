"""How many handles the kernel has of each open file, kept where the next daemon finds it.

Guards I7 and I9 across a daemon's death: an image that is open is never dropped, an open file never closed.  So a
count may be too high, never too low: it goes up before an open is answered and down after a release is, and what
the kernel sends again is counted again.  What a daemon killed at that very instant leaves too many, lostopens.py takes
back.

The memory file, written by one daemon at a time, begins with SLOTS_MAX times

    inode u64 | count u64         native byte order; a count of 0 is a free slot

and goes on as lastentries.py says.

A word is written in one store, so that a killed daemon leaves it old or new.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading

# Different files open at once; 1 MiB, of which only what is used takes memory.
SLOTS_MAX = 1 << 16
_WORDS = 2
TABLE_BYTES = SLOTS_MAX * _WORDS * 8


class Handles:
    """The counts in a memory file made by `make_table`, whose descriptor stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._words = memoryview(mmap.mmap(fd, TABLE_BYTES)).cast("Q")
        words = self._words.tolist()
        self._slots = {words[i]: i for i in range(0, len(words), _WORDS) if words[i + 1]}
        self._free = [i for i in range(0, len(words), _WORDS) if not words[i + 1]]
        self._free.reverse()
        self._lock = threading.Lock()

    def opened(self, inode: int) -> None:
        """Count one more handle.  Raises OSError with ENFILE."""
        with self._lock:
            slot = self._slots.get(inode)
            if slot is not None:
                self._words[slot + 1] += 1
                return
            if not self._free:
                raise OSError(errno.ENFILE, "too many open files in this mount")
            slot = self._slots[inode] = self._free.pop()
            # In this order: a slot is taken when it has a count.
            self._words[slot] = inode
            self._words[slot + 1] = 1

    def closed(self, inode: int, count: int = 1) -> int:
        """Count so many handles less; return how many are left.  Those that were never counted change nothing."""
        with self._lock:
            slot = self._slots.get(inode)
            if slot is None:
                return 0
            left = max(0, self._words[slot + 1] - count)
            self._words[slot + 1] = left
            if not left:
                del self._slots[inode]
                self._free.append(slot)
            return left

    def count(self, inode: int) -> int:
        """Return how many handles of a file there are."""
        with self._lock:
            slot = self._slots.get(inode)
            return 0 if slot is None else self._words[slot + 1]

    def all(self) -> dict[int, int]:
        """Return the count of each file that has handles."""
        with self._lock:
            return {inode: self._words[slot + 1] for inode, slot in self._slots.items()}


def make_table() -> int:
    """Return the descriptor of a memory file without any handle."""
    fd = os.memfd_create("lazyimg-handles")
    os.ftruncate(fd, TABLE_BYTES)
    return fd
