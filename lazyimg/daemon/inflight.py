"""What the kernel asked and was not answered yet.

Only reads that wait are noted one by one: a read of present bytes is answered before anything could look.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from lazyimg.image.lazyimage import LazyImage

# A read that waits longer is told apart, as hung: no disk takes so long.
HUNG_AFTER_S = 10.0
# Reads named in a snapshot, the oldest ones; their number is told in any case.
READS_NAMED_MAX = 500
# The kernel's count is compared with ours this often; what it counts more each time of so many is stuck.
SAMPLE_INTERVAL_S = 5.0
SAMPLES = 3


@dataclass(frozen=True, slots=True)
class ReadInFlight:
    """A read that waits.

    image: its id, None for a file of the upper folder.  waits_for: as LazyImage.waits_for says, or "upper".
    retries: failed requests of its image since the read began.
    """

    image: str | None
    start: int
    stop: int
    age_s: float
    waits_for: str
    retries: int


@dataclass(frozen=True, slots=True)
class RequestStatistics:
    """in_flight: requests of every kind that are not answered; reads: the oldest of those that are reads."""

    in_flight: int
    reads_in_flight: int
    reads_hung: int
    oldest_read_s: float
    reads: tuple[ReadInFlight, ...]
    unforeseen_errors: int


@dataclass(slots=True, eq=False)
class _Read:
    inode: int
    start: int
    stop: int
    began_s: float
    retries_before: int


class InFlight:
    """The requests that wait; `images` are the lazy ones by inode, all others belong to the upper folder."""

    def __init__(self, images: Mapping[int, LazyImage]) -> None:
        self._images = images
        # In the order in which they began.
        self._reads: dict[_Read, None] = {}
        # Handlers that have not returned.
        self.count = 0
        # Requests that a fault of our own failed, since the daemon started.
        self.unforeseen_errors = 0

    def begin_read(self, inode: int, start: int, size_bytes: int) -> _Read:
        """Note a read that waits, until `end_read`."""
        image = self._images.get(inode)
        retries = 0 if image is None else image.fetcher.statistics().retries
        read = _Read(inode, start, start + size_bytes, trio.current_time(), retries)
        self._reads[read] = None
        return read

    def end_read(self, read: _Read) -> None:
        del self._reads[read]

    def statistics(self) -> RequestStatistics:
        """Return a snapshot, the oldest reads first."""
        now_s = trio.current_time()
        ages = [now_s - read.began_s for read in self._reads]
        oldest = list(self._reads)[:READS_NAMED_MAX]
        return RequestStatistics(
            in_flight=self.count,
            reads_in_flight=len(ages),
            reads_hung=sum(age_s > HUNG_AFTER_S for age_s in ages),
            oldest_read_s=max(ages, default=0.0),
            reads=tuple(self._described(read, now_s) for read in oldest),
            unforeseen_errors=self.unforeseen_errors,
        )

    def _described(self, read: _Read, now_s: float) -> ReadInFlight:
        age_s = now_s - read.began_s
        image = self._images.get(read.inode)
        if image is None:
            return ReadInFlight(None, read.start, read.stop, age_s, "upper", 0)
        retries = image.fetcher.statistics().retries - read.retries_before
        waits_for = image.waits_for(read.start, read.stop)
        return ReadInFlight(image.record.id, read.start, read.stop, age_s, waits_for, retries)


class StuckRequests:
    """Requests that the kernel waits for and no daemon has: a killed one took them, before Linux 6.9.

    path: `waiting` of the mount's connection (Documentation/filesystems/fuse.rst), which may be missing.
    """

    def __init__(self, path: Path, fuse_fd: int, in_flight: InFlight) -> None:
        self._path = path
        self._in_flight = in_flight
        self._poll = select.poll()
        self._poll.register(fuse_fd, select.POLLIN)
        self._samples: deque[int] = deque(maxlen=SAMPLES)

    @property
    def count(self) -> int | None:
        """How many there are, None where that is not known, or not yet."""
        return min(self._samples) if len(self._samples) == SAMPLES else None

    async def watch(self) -> None:
        """Compare the kernel's count with ours now and then, until cancelled."""
        while True:
            self.sample()
            await trio.sleep(SAMPLE_INTERVAL_S)

    def sample(self) -> None:
        """Compare once.  The file is the kernel's own: reading it waits for nobody."""
        try:
            waiting = int(self._path.read_text())
        except (OSError, ValueError):
            # fusectl is not mounted, or the connection is gone.
            self._samples.clear()
            return
        # What still lies in the queue was taken by nobody.
        is_queue_empty = not self._poll.poll(0)
        self._samples.append(max(0, waiting - self._in_flight.count) if is_queue_empty else 0)
