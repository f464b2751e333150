"""The fetch plan against a naive model that only remembers which piece is in which state, and since when."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from lazyimg.core.fetchplan import FetchPlan, Piece, Request

BYTES_MAX = 40
# Pieces of several sizes, one larger than a request may be, with a hole in the source after the eighth.
SIZES = [10, 10, 7, 3, 20, 10, 50, 10, 10, 10, 1, 10, 10, 10, 10]
HOLE_AFTER = 8


def _cut() -> list[Piece]:
    pieces, at = [], 0
    for i, size in enumerate(SIZES):
        pieces.append(Piece(at, at + size))
        at += size + (5 if i == HOLE_AFTER else 0)
    return pieces


PIECES = _cut()
some_pieces = st.lists(st.sampled_from(PIECES), max_size=6)


class PlanMachine(RuleBasedStateMachine):
    """Any sequence of calls; `order` holds each wanted piece by urgency, first asked first."""

    flights = Bundle("flights")

    def __init__(self) -> None:
        super().__init__()
        self.plan = FetchPlan(BYTES_MAX)
        self.order: dict[bool, list[Piece]] = {True: [], False: []}
        self.in_flight: set[Piece] = set()

    @rule(pieces=some_pieces, urgent=st.booleans())
    def want(self, pieces: list[Piece], urgent: bool) -> None:
        self.plan.want(pieces, urgent=urgent)
        for piece in pieces:
            if piece in self.in_flight or piece in self.order[True]:
                continue
            if urgent and piece in self.order[False]:
                self.order[False].remove(piece)
            if piece not in self.order[urgent]:
                self.order[urgent].append(piece)

    @rule(pieces=some_pieces)
    def abandon(self, pieces: list[Piece]) -> None:
        self.plan.abandon(pieces)
        for order in self.order.values():
            order[:] = [piece for piece in order if piece not in pieces]

    @rule()
    def abandon_background(self) -> None:
        self.plan.abandon_background()
        self.order[False].clear()

    @rule(target=flights, urgent=st.booleans())
    def next_request(self, urgent: bool) -> Request | None:
        request = self.plan.next_request(urgent=urgent)
        if not self.order[urgent]:
            assert request is None
            return None
        assert request is not None
        assert request.is_urgent == urgent
        self._check(request.pieces, self.order[urgent][0], urgent)
        # [I3]: what is in flight is in no other request.
        assert not self.in_flight & set(request.pieces)
        self.in_flight |= set(request.pieces)
        for order in self.order.values():
            order[:] = [piece for piece in order if piece not in request.pieces]
        return request

    def _check(self, pieces: Sequence[Piece], first: Piece, urgent: bool) -> None:
        wanted = {*self.order[True], *self.order[False]}
        assert set(pieces) <= wanted
        assert first in pieces
        assert all(a.stop == b.start for a, b in pairwise(pieces))
        size_bytes = pieces[-1].stop - pieces[0].start
        assert size_bytes <= BYTES_MAX or len(pieces) == 1
        # [I4]: nothing but urgent pieces comes before the one an urgent request is for.
        if urgent:
            assert set(pieces[: pieces.index(first)]) <= set(self.order[True])
        # No neighbour that would have fitted was left behind.
        after = [p for p in wanted if p.start == pieces[-1].stop]
        before = [p for p in self.order[True] if p.stop == pieces[0].start]
        for piece in after + before:
            assert size_bytes + piece.stop - piece.start > BYTES_MAX

    @rule(request=consumes(flights), arrived_count=st.integers(0, len(PIECES)))
    def end(self, request: Request | None, arrived_count: int) -> None:
        """A flight brings some of its pieces, and fails for the others."""
        if request is None:
            return
        for piece in request.pieces[:arrived_count]:
            self.plan.arrived(piece)
        self.plan.failed(request.pieces[arrived_count:])
        self.in_flight -= set(request.pieces)

    @precondition(lambda self: not self.in_flight)
    @rule()
    def drain(self) -> None:
        """Requests go on until nothing is wanted, each piece once."""
        seen: list[Piece] = []
        for urgent in (True, False):
            while request := self.plan.next_request(urgent=urgent):
                seen += request.pieces
                for piece in request.pieces:
                    self.plan.arrived(piece)
        assert sorted(seen) == sorted(self.order[True] + self.order[False])
        for order in self.order.values():
            order.clear()

    @invariant()
    def agrees(self) -> None:
        assert self.plan.has_urgent == bool(self.order[True])
        assert self.plan.has_background == bool(self.order[False])
        assert self.plan.in_flight_count == len(self.in_flight)
        pending = {*self.order[True], *self.order[False], *self.in_flight}
        assert {piece for piece in PIECES if self.plan.is_pending(piece)} == pending


@pytest.mark.slow
class TestPlan(PlanMachine.TestCase):  # type: ignore[valid-type,misc]  # made at run time
    settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

    def test_plan_agrees_with_model(self) -> None:
        """Any calls in any order: each piece in at most one flight [I3], none lost, none asked in vain."""
        self.runTest()
