"""How far past a read to fetch.

Pure.  A read that belongs to no sequence gets a small window, since what lies behind it is a guess; a sequence's
window doubles with what was read of it.  A guest's boot has several sequences at once, so a few are remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

# Sequences remembered at once; a boot reads from a handful of places.
SEQUENCES_MAX = 16
# A read this far past the end of a sequence still continues it: file systems skip over small holes, and the
# kernel's own read-ahead reorders.
GAP_BYTES_MAX = 256 << 10


@dataclass(slots=True)
class _Sequence:
    next_start: int
    run_bytes: int


class Readahead:
    """The sequences seen in one image's reads."""

    def __init__(self, random_bytes_max: int, sequence_bytes_max: int) -> None:
        self._random_bytes_max = random_bytes_max
        self._sequence_bytes_max = sequence_bytes_max
        # Least recently continued first.
        self._sequences: list[_Sequence] = []

    def window_bytes(self, start: int, stop: int, *, is_hit: bool) -> int:
        """Note the read `[start, stop)` and return how many bytes from `start` are worth having.

        is_hit: the bytes were present.  Such a read is worth nothing more unless it continues a sequence.
        """
        sequence = self._continued_by(start)
        if sequence is None:
            self._sequences.append(_Sequence(stop, stop - start))
            del self._sequences[:-SEQUENCES_MAX]
            return 0 if is_hit else max(stop - start, self._random_bytes_max)
        self._sequences.remove(sequence)
        self._sequences.append(sequence)
        sequence.run_bytes += max(0, stop - sequence.next_start)
        sequence.next_start = max(sequence.next_start, stop)
        window = max(self._random_bytes_max, 2 * sequence.run_bytes)
        return max(stop - start, min(window, self._sequence_bytes_max))

    def _continued_by(self, start: int) -> _Sequence | None:
        for sequence in reversed(self._sequences):
            # A read of what the sequence has just passed is a part of it too (reordered, or read again).
            if sequence.next_start - GAP_BYTES_MAX <= start <= sequence.next_start + GAP_BYTES_MAX:
                return sequence
        return None
