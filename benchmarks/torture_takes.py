"""What daemon and holder take while they are tortured: descriptors and memory, and whether that grows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torture_strikes import processes_of

# Each of the daemon's threads that have used the index keeps a connection to it, of up to three descriptors.
DESCRIPTORS_MORE_MAX = 64
DAEMON_MEMORY_MB_MAX = 250.0
HOLDER_MEMORY_MORE_MB_MAX = 10.0


@dataclass(frozen=True)
class Takes:
    """Descriptors and resident memory of a process."""

    descriptors: int
    memory_mb: float

    def most(self, other: Takes) -> Takes:
        """Return the larger of each."""
        return Takes(max(self.descriptors, other.descriptors), max(self.memory_mb, other.memory_mb))


def takes() -> dict[str, Takes]:
    """Return what daemon and holder take now.  Raises OSError if one ends meanwhile."""
    processes = {role: processes_of(role) for role in ("holder", "daemon")}
    return {
        role: Takes(len(os.listdir(f"/proc/{found[-1]}/fd")), _resident_mb(found[-1]))
        for role, found in processes.items()
        if found
    }


def _resident_mb(process_id: int) -> float:
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def print_takes(begin: dict[str, Takes], peak: dict[str, Takes], end: dict[str, Takes]) -> list[str]:
    """Print descriptors and memory; return what is too much at the end."""
    both = " ".join(
        f"{heading:>18} {'most':>6} {'end':>6}" for heading in ("descriptors: begin", "MB: begin")
    )
    print(f"\n{'process':8} {both}")
    for name, first in begin.items():
        most, last = peak[name], end[name]
        descriptors = f"{first.descriptors:18} {most.descriptors:6} {last.descriptors:6}"
        print(f"{name:8} {descriptors} {first.memory_mb:18.1f} {most.memory_mb:6.1f} {last.memory_mb:6.1f}")
    problems = [
        f"{name}: {end[name].descriptors} descriptors at the end, {first.descriptors} at the beginning"
        for name, first in begin.items()
        if end[name].descriptors > first.descriptors + DESCRIPTORS_MORE_MAX
    ]
    if end["daemon"].memory_mb > DAEMON_MEMORY_MB_MAX:
        problems.append(f"daemon: {end['daemon'].memory_mb:.0f} MB at the end")
    if end["holder"].memory_mb > begin["holder"].memory_mb + HOLDER_MEMORY_MORE_MB_MAX:
        problems.append(f"holder: {end['holder'].memory_mb:.0f} MB at the end")
    return problems
