"""What of one image somebody waits for: chunks, and tables of the source, and what came of each.

Guards I5: nobody waits without end for what is urgent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import trio

from lazyimg.core.fetchplan import FetchPlan, Piece
from lazyimg.errors import LazyImgError, ReadTimeout
from lazyimg.image.view import View

# Why chunks have not come: a request for them is out; a pause after a failure; all requests that may be out are;
# a stream that has not come so far; the tables that say where they are.
Cause = Literal["glance", "retry", "slot", "stream", "tables"]
# A chunk by its number, a table by its piece.
Key = TypeVar("Key", int, Piece)


@dataclass(slots=True)
class Want:
    """Shared by all who wait; `arrived` is set once either `data` or `error` is.

    pieces: what of the source it needs.
    """

    pieces: list[Piece]
    is_urgent: bool
    waiters: int = 0
    arrived: trio.Event = field(default_factory=trio.Event)
    data: bytes | None = None
    error: LazyImgError | None = None

    def outcome(self) -> bytes:
        """Return the bytes, or raise what kept them from coming."""
        if self.error is not None:
            # A fresh one for each reader: a shared exception would collect all their tracebacks.
            raise type(self.error)(str(self.error)) from self.error
        assert self.data is not None
        return self.data


class Wants:
    """All that is waited for, by chunk or table."""

    def __init__(self, image_id: str, plan: FetchPlan, view: View, read_timeout_s: float) -> None:
        self._image_id = image_id
        self._plan = plan
        self._view = view
        self._read_timeout_s = read_timeout_s
        self._wants: dict[int | Piece, Want] = {}
        # How many wants need a piece: of one that several chunks come from, others may wait when one is given up.
        self._needs: Counter[Piece] = Counter()
        # Scopes of those who wait for what is urgent.
        self._readers: set[trio.CancelScope] = set()
        # What went wrong last, for whoever waits in vain.
        self.last_error: LazyImgError | None = None

    def __len__(self) -> int:
        return len(self._wants)

    def __iter__(self) -> Iterator[int | Piece]:
        return iter(self._wants)

    def __contains__(self, key: object) -> bool:
        return key in self._wants

    def is_urgent(self, key: int | Piece) -> bool:
        """True if a reader waits for it."""
        want = self._wants.get(key)
        return want is not None and want.is_urgent

    def join(self, key: int | Piece, *, urgent: bool) -> Want:
        """Wait, from now on, for a chunk or table; `leave` is the reverse.  Raises SourceDamaged."""
        want = self._wants.get(key)
        if want is None:
            pieces = self._view.plan(key) if isinstance(key, int) else [key]
            want = self._wants[key] = Want(pieces, urgent)
            self._needs.update(pieces)
        want.is_urgent |= urgent
        want.waiters += 1
        return want

    def cause(self, chunks: Iterable[int], *, is_streaming: bool, is_paused: bool) -> Cause | None:
        """Say what keeps these chunks from coming, None if nobody waits for any of them or for a table."""
        wants = [want for chunk in chunks if (want := self._wants.get(chunk)) is not None]
        if not wants:
            return "tables" if any(not isinstance(key, int) for key in self._wants) else None
        if is_streaming:
            return "stream"
        if any(self._plan.is_in_flight(piece) for want in wants for piece in want.pieces):
            return "glance"
        return "retry" if is_paused else "slot"

    def leave(self, wants: Mapping[Key, Want]) -> None:
        """Take one waiter off each; what nobody waits for and no flight brings is no longer wanted."""
        for key, want in wants.items():
            want.waiters -= 1
            if not want.waiters and self._wants.get(key) is want:
                self._drop(key)

    async def outcomes(self, wants: Mapping[Key, Want]) -> dict[Key, bytes]:
        """Wait for all of them.  Raises what any of them came to."""
        got: dict[Key, bytes] = {}
        for key, want in wants.items():
            await want.arrived.wait()
            got[key] = want.outcome()
        return got

    @contextmanager
    def limit(self, chunks: Sequence[int], *, urgent: bool) -> Iterator[None]:
        """Let the block, which waits for these chunks and their tables, take `read_timeout` where that is urgent.

        Raises ReadTimeout when it takes longer.
        """
        limit_s = self._read_timeout_s if urgent else float("inf")
        scope = trio.CancelScope(deadline=trio.current_time() + limit_s)
        if urgent:
            self._readers.add(scope)
        try:
            with scope:
                yield
        finally:
            self._readers.discard(scope)
        if scope.cancelled_caught:
            first, last = chunks[0], chunks[-1]
            what = f"chunk {first}" if first == last else f"one of the chunks {first} to {last}"
            raise ReadTimeout(
                f"image {self._image_id}: {what} did not come within "
                f"{self._read_timeout_s:g} s ({self.last_error or 'no answer'}); the next read tries again"
            )

    def prolong(self) -> None:
        """A stream goes on: whoever waits may wait as long again."""
        for reader in self._readers:
            reader.deadline = trio.current_time() + self._read_timeout_s

    def hand_over(self, key: int | Piece, data: bytes) -> None:
        """It has arrived: give it to those who wait, if anybody does."""
        if key in self._wants:
            want, _ = self._remove(key)
            want.data = data
            want.arrived.set()

    def fail(self, keys: Iterable[int | Piece], error: LazyImgError) -> None:
        """It will not arrive: tell those who wait."""
        for key in keys:
            want = self._wants.get(key)
            if want is not None:
                want.error = error
                want.arrived.set()
                self._drop(key)

    def missing_pieces(self, *, urgent: bool) -> list[Piece]:
        """Return the pieces that wants of this urgency still need."""
        missing: list[Piece] = []
        for key, want in self._wants.items():
            if want.is_urgent == urgent:
                # Of several pieces of a chunk some may have arrived.
                is_parted = isinstance(key, int) and len(want.pieces) > 1
                missing += self._view.plan(key) if isinstance(key, int) and is_parted else want.pieces
        return missing

    def _remove(self, key: int | Piece) -> tuple[Want, list[Piece]]:
        """Return the want, and those of its pieces that no other one needs."""
        want = self._wants.pop(key)
        self._needs.subtract(want.pieces)
        needless = [piece for piece in want.pieces if not self._needs[piece]]
        for piece in needless:
            del self._needs[piece]
        return want, needless

    def _drop(self, key: int | Piece) -> None:
        want, needless = self._remove(key)
        self._plan.abandon(needless)
        if isinstance(key, int) and not any(map(self._plan.is_pending, want.pieces)):
            self._view.forget(key)
