"""The circuit breaker, by its drawing: closed, open, half-open, and whoever reports late."""

from __future__ import annotations

from lazyimg.core.breaker import Breaker


def make_breaker() -> Breaker:
    return Breaker(failures_max=3, pause_min_s=1, pause_max_s=5)


def opened_at(now_s: float) -> Breaker:
    """Return a breaker that has just opened."""
    breaker = make_breaker()
    for _ in range(3):
        breaker.failed(now_s, "no answer", is_probe=False)
    assert breaker.state == "open"
    return breaker


def test_failures_in_a_row_open_it() -> None:
    """An answer in between begins the row anew."""
    breaker = make_breaker()
    for failed in (True, True, False, True, True):
        assert breaker.may_ask(0)
        if failed:
            breaker.failed(0, "no answer", is_probe=False)
        else:
            breaker.answered(0)
    assert breaker.is_closed
    breaker.failed(7, "gone", is_probe=False)
    assert (breaker.state, breaker.since_s, breaker.last_error) == ("open", 7, "gone")


def test_after_the_pause_one_may_ask() -> None:
    """One probe, however many come; the others are told no until it is back."""
    breaker = opened_at(10)
    assert not breaker.may_ask(10.9)
    assert breaker.may_ask(11)
    assert breaker.state == "half-open"
    assert not breaker.may_ask(11)
    assert not breaker.may_ask(100)


def test_answered_probe_closes_it() -> None:
    """From then on all may ask, and the next outage begins with the shortest pause."""
    breaker = opened_at(10)
    assert breaker.may_ask(11)
    breaker.failed(11, "still", is_probe=True)
    assert breaker.may_ask(13)
    breaker.answered(14)
    assert (breaker.state, breaker.since_s) == ("closed", 14)
    assert breaker.may_ask(14)
    for _ in range(3):
        breaker.failed(20, "again", is_probe=False)
    assert breaker.probe_at_s == 21


def test_pauses_double_up_to_a_limit() -> None:
    """A server that stays away is asked ever more seldom, but never more seldom than the longest pause."""
    breaker = opened_at(0)
    pauses, now_s = [], 0.0
    for _ in range(5):
        pauses.append(breaker.probe_at_s - now_s)
        now_s = breaker.probe_at_s
        assert breaker.may_ask(now_s)
        breaker.failed(now_s, "still", is_probe=True)
    assert pauses == [1, 2, 4, 5, 5]
    assert breaker.since_s == 0, "the outage is as old as it is"


def test_probe_that_was_given_up_leaves_room_for_the_next() -> None:
    """Who asked went away: it says nothing of the server."""
    breaker = opened_at(0)
    assert breaker.may_ask(1)
    breaker.probe_ended(1.5)
    assert breaker.state == "open"
    assert breaker.may_ask(1.5)


def test_late_failure_is_not_the_probes() -> None:
    """Requests sent before it opened fail one after another; neither pause nor probe is theirs to end."""
    breaker = opened_at(0)
    breaker.failed(0.5, "late", is_probe=False)
    assert breaker.probe_at_s == 1
    assert breaker.may_ask(1)
    breaker.failed(1.5, "later", is_probe=False)
    assert breaker.state == "half-open"
    assert breaker.last_error == "later"


def test_late_answer_closes_it() -> None:
    """An answer is an answer, and the probe's end then changes nothing."""
    breaker = opened_at(0)
    assert breaker.may_ask(1)
    breaker.answered(1.2)
    breaker.probe_ended(1.3)
    assert breaker.is_closed


def test_longest_pause_below_the_shortest_holds() -> None:
    """Where an operator wants short pauses, the first is short too."""
    breaker = Breaker(failures_max=1, pause_min_s=1, pause_max_s=0.2)
    breaker.failed(0, "no answer", is_probe=False)
    assert breaker.probe_at_s == 0.2
