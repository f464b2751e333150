"""What was found damaged in the cache folder, put aside for a human to look at; bounded."""

from __future__ import annotations

import os

from lazyimg.store.folder import PrivateFolder

# Evidence for a human, not worth more than this of the cache's disk.
ASIDE_COUNT_MAX = 8
ASIDE_BYTES_MAX = 256 << 20


class Aside:
    """The folder `aside/`.  Methods are for threads and raise OSError.

    count: files and folders put there by this process.
    """

    def __init__(self, folder: PrivateFolder) -> None:
        self._folder = folder
        self.count = 0

    def take(self, folder: PrivateFolder, name: str) -> None:
        """Move a file or folder here, and remove the oldest above the limits; nothing happens if it is not there."""
        try:
            moved = folder.move(name, self._folder)
        except FileNotFoundError:
            return
        self.count += 1
        folder.sync()
        os.utime(moved, dir_fd=self._folder.fd, follow_symlinks=False)
        kept = sorted(self._folder.names(), key=lambda one: self._folder.stat(one).st_mtime_ns, reverse=True)
        total_bytes = 0
        for count, one in enumerate(kept, 1):
            total_bytes += self._folder.allocated_bytes(one)
            if count > ASIDE_COUNT_MAX or total_bytes > ASIDE_BYTES_MAX:
                self._folder.remove(one)
