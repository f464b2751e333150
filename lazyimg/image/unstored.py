"""The latest chunks that could not be stored, in memory, for all images.

Without a disk each small read of a guest would fetch its whole chunk anew; most of them follow one another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

# A few MiB for each guest of a busy host; a guest reads again soon what it reads in small steps.
UNSTORED_BYTES_MAX = 32 << 20


class Unstored:
    """Chunks by the object that owns them and their number; the first that came go first."""

    def __init__(self, bytes_max: int = UNSTORED_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._chunks: OrderedDict[tuple[object, int], bytes] = OrderedDict()
        self._size_bytes = 0

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, owner: object, chunk: int) -> bytes | None:
        return self._chunks.get((owner, chunk))

    def keep(self, owner: object, chunks: Iterable[tuple[int, bytes]]) -> None:
        """Keep chunks for a while."""
        for chunk, data in chunks:
            self._drop((owner, chunk))
            self._chunks[owner, chunk] = data
            self._size_bytes += len(data)
        while self._size_bytes > self._bytes_max:
            self._drop(next(iter(self._chunks)))

    def take(self, owner: object, chunk: int) -> bool:
        """Let go of one chunk; False if it was not here."""
        is_here = (owner, chunk) in self._chunks
        self._drop((owner, chunk))
        return is_here

    def forget(self, owner: object) -> None:
        """Let go of all of an owner's chunks."""
        for key in [key for key in self._chunks if key[0] is owner]:
            self._drop(key)

    def _drop(self, key: tuple[object, int]) -> None:
        self._size_bytes -= len(self._chunks.pop(key, b""))
