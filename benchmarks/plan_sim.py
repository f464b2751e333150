"""Which read-ahead settings would make a recorded boot quick, by simulation and in a second?

Runs lazyimg.core.readahead's own decisions over a trace, with a link of given latency and bandwidth.  It
knows no CPU but a constant per read and per request: good for choosing between settings, not for promising
seconds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import boot_trace
from boot_trace import Trace

from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_range, chunks_of
from lazyimg.core.readahead import Readahead

LINK_BYTES_PER_S = 119e6  # What 1 Gbit/s leaves for TCP's payload.
HERE = Path(__file__).parent


@dataclass
class Link:
    """Answers leave in the order of the requests; each begins a latency after it was asked, or later."""

    latency_s: float
    free_at_s: float = 0.0
    sent_bytes: int = 0
    requests: int = 0

    def send(self, chunks: list[int], size_bytes: int, now_s: float) -> dict[int, float]:
        """Return when each chunk of one request has arrived."""
        self.requests += 1
        at_s = max(now_s + self.latency_s, self.free_at_s)
        arrivals: dict[int, float] = {}
        for chunk in chunks:
            start, stop = chunk_range(chunk, size_bytes)
            self.sent_bytes += stop - start
            at_s += (stop - start) / LINK_BYTES_PER_S
            arrivals[chunk] = at_s
        self.free_at_s = at_s
        return arrivals


@dataclass
class Boot:
    """A reader that reads one after the other, and what it has been sent."""

    trace: Trace
    link: Link
    readahead: Readahead
    request_bytes_max: int
    background_requests_max: int
    read_s: float
    arrivals: dict[int, float] = field(default_factory=dict)
    background_ends_s: list[float] = field(default_factory=list)
    now_s: float = 0.0

    def run(self) -> float:
        """Return the seconds of the whole trace."""
        for offset, length in self.trace.reads:
            self.now_s += self.read_s
            self._read(offset, offset + length)
        return self.now_s

    def _read(self, start: int, stop: int) -> None:
        wanted = chunks_of(start, stop)
        is_hit = all(self.arrivals.get(chunk, self.now_s + 1) <= self.now_s for chunk in wanted)
        window_stop = start + self.readahead.window_bytes(start, stop, is_hit=is_hit)
        behind = range(wanted.stop, chunks_of(0, min(window_stop, self.trace.image_size_bytes)).stop)
        asked = [chunk for chunk in wanted if chunk not in self.arrivals]
        ahead = self._run_of_unasked(behind)
        if asked:
            # The reader's own request takes in the neighbours that follow.
            self._send(asked + [chunk for i, chunk in enumerate(ahead, asked[-1] + 1) if chunk == i])
        elif ahead and self._has_background_slot():
            self.background_ends_s.append(self._send(ahead))
        self.now_s = max(self.now_s, *(self.arrivals[chunk] for chunk in wanted))

    def _run_of_unasked(self, chunks: range) -> list[int]:
        absent = itertools.dropwhile(self.arrivals.__contains__, chunks)
        return list(itertools.takewhile(lambda chunk: chunk not in self.arrivals, absent))

    def _has_background_slot(self) -> bool:
        self.background_ends_s = [end_s for end_s in self.background_ends_s if end_s > self.now_s]
        return len(self.background_ends_s) < self.background_requests_max

    def _send(self, chunks: list[int]) -> float:
        per_request = max(1, self.request_bytes_max // CHUNK_SIZE_BYTES)
        for first in range(0, len(chunks), per_request):
            part = chunks[first : first + per_request]
            self.arrivals |= self.link.send(part, self.trace.image_size_bytes, self.now_s)
        return self.arrivals[chunks[-1]]


def main() -> int:
    """Parse the command line and print a line per combination of settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=HERE / "traces" / "debian-boot.csv")
    parser.add_argument(
        "--latency-ms", type=float, default=2.4, help="to the first byte, our own work included"
    )
    parser.add_argument("--read-ms", type=float, default=0.1, help="what each read costs by itself")
    parser.add_argument("--random-kib", default="64,128,256,512,1024", help="random_request_bytes_max")
    parser.add_argument("--sequence-kib", default="1024,8192", help="the largest window of a sequence")
    options = parser.parse_args()
    trace = boot_trace.load_trace(options.trace)
    print(trace.describe())
    print(f"{'random, KiB':>11} {'sequence, KiB':>13} {'seconds':>8} {'MB sent':>8} {'requests':>8}")
    sizes = itertools.product(options.random_kib.split(","), options.sequence_kib.split(","))
    for random_kib, sequence_kib in sizes:
        link = Link(options.latency_ms / 1e3)
        readahead = Readahead(int(random_kib) << 10, int(sequence_kib) << 10)
        seconds = Boot(trace, link, readahead, 8 << 20, 4, options.read_ms / 1e3).run()
        sent = f"{link.sent_bytes / 1e6:8.1f} {link.requests:8}"
        print(f"{random_kib:>11} {sequence_kib:>13} {seconds:8.2f} {sent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
