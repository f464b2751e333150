"""What the kernel says of this process.  From /proc, so that it answers whatever hangs."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessStatistics:
    """memory_bytes: what is resident."""

    memory_bytes: int
    descriptors: int


def statistics() -> ProcessStatistics:
    """Return a snapshot of this process."""
    # proc_pid_statm(5): the second number is what is resident, in pages.
    with open("/proc/self/statm") as statm:
        pages = int(statm.read().split()[1])
    # The listing has a descriptor of its own.
    descriptors = len(os.listdir("/proc/self/fd")) - 1
    return ProcessStatistics(pages * os.sysconf("SC_PAGE_SIZE"), descriptors)
