"""Which requests to send next.

Pure: no I/O and no clock.  Guards I3 (a piece is in at most one flight) and I4 (urgent before background).
A piece moves so:

                want                 next_request            arrived
    (unknown) ───────► urgent or ───────────────► in flight ─────────► (unknown: present, or asked again)
                ◄─────  background  ◄───────────────┘
                abandon               failed: the caller wants it again, or not
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Piece(NamedTuple):
    """A range `[start, stop)` of the source that is fetched as a whole.

    It becomes the presented bytes `[presented_start, presented_stop)`, once decoded if it is compressed; a piece
    of tables becomes none, both are 0 then.
    """

    start: int
    stop: int
    presented_start: int = 0
    presented_stop: int = 0
    is_compressed: bool = False


class Request(NamedTuple):
    """One range GET: the pieces it covers, adjacent and in order."""

    pieces: tuple[Piece, ...]
    is_urgent: bool

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def stop(self) -> int:
        return self.pieces[-1].stop


class FetchPlan:
    """What of one image is wanted and what is in flight.

    Two pieces seldom overlap unless they are equal; those that do go by different requests.
    """

    def __init__(self, request_bytes_max: int) -> None:
        self._request_bytes_max = request_bytes_max
        # Insertion order is the order of asking; it is kept when a background piece becomes urgent.
        self._urgent: dict[Piece, None] = {}
        self._background: dict[Piece, None] = {}
        self._wanted_by_start: dict[int, Piece] = {}
        self._wanted_by_stop: dict[int, Piece] = {}
        self._in_flight: set[Piece] = set()

    @property
    def has_urgent(self) -> bool:
        return bool(self._urgent)

    @property
    def has_background(self) -> bool:
        return bool(self._background)

    @property
    def background_count(self) -> int:
        return len(self._background)

    @property
    def in_flight_count(self) -> int:
        return len(self._in_flight)

    def is_pending(self, piece: Piece) -> bool:
        """True if the piece is wanted or in flight: nobody needs to ask for it again."""
        return piece in self._in_flight or piece in self._urgent or piece in self._background

    def is_in_flight(self, piece: Piece) -> bool:
        return piece in self._in_flight

    def want(self, pieces: Iterable[Piece], *, urgent: bool) -> None:
        """Ask for pieces.  One in flight stays as it is; one wanted in the background may become urgent."""
        for piece in pieces:
            if piece in self._in_flight or piece in self._urgent:
                continue
            if urgent:
                self._background.pop(piece, None)
                self._urgent[piece] = None
            else:
                self._background[piece] = None
            self._wanted_by_start[piece.start] = piece
            self._wanted_by_stop[piece.stop] = piece

    def hasten(self, pieces: Iterable[Piece]) -> None:
        """Make urgent those of the pieces that are wanted in the background."""
        self.want([piece for piece in pieces if piece in self._background], urgent=True)

    def abandon(self, pieces: Iterable[Piece]) -> None:
        """Forget pieces that are wanted; what is in flight arrives all the same."""
        for piece in pieces:
            self._forget(piece)

    def abandon_background(self) -> None:
        """Forget all that only background work wants."""
        self.abandon(list(self._background))

    def next_request(self, *, urgent: bool) -> Request | None:
        """Return the next request, None when nothing of that urgency is wanted; its pieces are in flight from here.

        It starts from the piece asked first and takes in wanted neighbours: any that follow, and urgent ones
        that precede, up to `request_bytes_max` bytes in all.  Background ones that precede would delay it.
        """
        first = next(iter(self._urgent if urgent else self._background), None)
        if first is None:
            return None
        pieces = [first]
        size_bytes = first.stop - first.start
        while before := self._neighbour(self._wanted_by_stop.get(pieces[0].start), size_bytes, urgent):
            pieces.insert(0, before)
            size_bytes += before.stop - before.start
        while after := self._neighbour(self._wanted_by_start.get(pieces[-1].stop), size_bytes, urgent=False):
            pieces.append(after)
            size_bytes += after.stop - after.start
        for piece in pieces:
            self._forget(piece)
            self._in_flight.add(piece)
        return Request(tuple(pieces), urgent)

    def arrived(self, piece: Piece) -> None:
        """A piece's flight has brought it, and it is stored or was handed over."""
        self._in_flight.discard(piece)

    def failed(self, pieces: Iterable[Piece]) -> None:
        """A flight ended without these; they are unknown again, want them again if anybody does."""
        self._in_flight.difference_update(pieces)

    def _neighbour(self, piece: Piece | None, size_bytes: int, urgent: bool) -> Piece | None:
        if piece is None or (urgent and piece not in self._urgent):
            return None
        return piece if size_bytes + piece.stop - piece.start <= self._request_bytes_max else None

    def _forget(self, piece: Piece) -> None:
        self._urgent.pop(piece, None)
        self._background.pop(piece, None)
        if self._wanted_by_start.get(piece.start) == piece:
            del self._wanted_by_start[piece.start]
        if self._wanted_by_stop.get(piece.stop) == piece:
            del self._wanted_by_stop[piece.stop]
