"""Which requests are sent next: one rule a test; the model test tries them in every order."""

from __future__ import annotations

from lazyimg.core.fetchplan import FetchPlan, Piece


def pieces(*numbers: int) -> list[Piece]:
    """Pieces of ten bytes, number n at byte 10 n."""
    return [Piece(10 * n, 10 * n + 10) for n in numbers]


def plan_of(
    *, urgent: tuple[int, ...] = (), background: tuple[int, ...] = (), bytes_max: int = 100
) -> FetchPlan:
    plan = FetchPlan(bytes_max)
    plan.want(pieces(*background), urgent=False)
    plan.want(pieces(*urgent), urgent=True)
    return plan


def next_numbers(plan: FetchPlan, *, urgent: bool) -> list[int]:
    """Return the numbers of the next request's pieces."""
    request = plan.next_request(urgent=urgent)
    return [] if request is None else [piece.start // 10 for piece in request.pieces]


def test_neighbours_become_one_request() -> None:
    """Adjacent pieces are asked in one range, in the order of the source, whatever the order of asking."""
    plan = plan_of(urgent=(4, 2, 3, 7))
    request = plan.next_request(urgent=True)
    assert request is not None
    assert (request.start, request.stop) == (20, 50)
    assert next_numbers(plan, urgent=True) == [7]
    assert not plan.has_urgent


def test_piece_in_flight_is_not_asked_again() -> None:
    """[I3] Wanting what is in flight changes nothing; once it has arrived it can be wanted again."""
    plan = plan_of(urgent=(1,))
    assert next_numbers(plan, urgent=True) == [1]
    plan.want(pieces(1), urgent=True)
    plan.want(pieces(1), urgent=False)
    assert plan.next_request(urgent=True) is plan.next_request(urgent=False) is None
    plan.arrived(pieces(1)[0])
    plan.want(pieces(1), urgent=True)
    assert next_numbers(plan, urgent=True) == [1]


def test_failed_piece_is_unknown_until_wanted() -> None:
    """A flight that failed leaves it to the caller whether anybody still wants its pieces."""
    plan = plan_of(urgent=(1, 2))
    plan.next_request(urgent=True)
    plan.failed(pieces(1, 2))
    assert not plan.has_urgent
    plan.want(pieces(2), urgent=True)
    assert next_numbers(plan, urgent=True) == [2]


def test_urgent_request_takes_in_what_follows_and_not_what_precedes() -> None:
    """[I4] Read-ahead behind the wanted piece rides along; background pieces before it would delay it."""
    plan = plan_of(urgent=(5,), background=(3, 4, 6, 7))
    assert next_numbers(plan, urgent=True) == [5, 6, 7]
    assert next_numbers(plan, urgent=False) == [3, 4]


def test_urgent_request_takes_in_urgent_pieces_that_precede() -> None:
    """Urgent neighbours are one request whichever was asked first."""
    assert next_numbers(plan_of(urgent=(5, 4, 3)), urgent=True) == [3, 4, 5]


def test_background_piece_becomes_urgent() -> None:
    """[I4] What a reader now waits for is urgent, though it was asked in the background before."""
    plan = plan_of(background=(1, 9))
    plan.want(pieces(9), urgent=True)
    assert next_numbers(plan, urgent=True) == [9]
    assert next_numbers(plan, urgent=False) == [1]


def test_urgent_piece_stays_urgent() -> None:
    """Background work that wants the same piece does not make it wait."""
    plan = plan_of(urgent=(1,))
    plan.want(pieces(1), urgent=False)
    assert not plan.has_background
    assert next_numbers(plan, urgent=True) == [1]


def test_request_has_a_largest_size() -> None:
    """[I5] No request is wider than `request_bytes_max`; the rest waits for the next."""
    plan = plan_of(urgent=tuple(range(7)), bytes_max=30)
    assert [next_numbers(plan, urgent=True) for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_piece_larger_than_a_request_goes_alone() -> None:
    """A piece is fetched as a whole, so one that is too large is a request of its own."""
    plan = plan_of(urgent=(1, 2), bytes_max=5)
    assert next_numbers(plan, urgent=True) == [1]
    assert next_numbers(plan, urgent=True) == [2]


def test_abandoned_pieces_are_not_asked() -> None:
    """What nobody wants any more is forgotten, but for what is in flight."""
    plan = plan_of(urgent=(1, 5), background=(8, 9))
    assert next_numbers(plan, urgent=True) == [1]
    plan.abandon(pieces(1, 5, 8))
    assert plan.in_flight_count == 1
    assert not plan.has_urgent
    assert next_numbers(plan, urgent=False) == [9]


def test_background_can_be_abandoned_at_once() -> None:
    """An image that nobody has open any more keeps only what is urgent."""
    plan = plan_of(urgent=(1,), background=(2, 8))
    plan.abandon_background()
    assert not plan.has_background
    assert next_numbers(plan, urgent=True) == [1]


def test_first_asked_is_first_sent() -> None:
    """Requests start from the piece asked first."""
    plan = plan_of(urgent=(9, 1, 5))
    assert [next_numbers(plan, urgent=True) for _ in range(3)] == [[9], [1], [5]]
