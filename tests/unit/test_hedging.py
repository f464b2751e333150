"""When a second request is sent: measured, and never often."""

from __future__ import annotations

from lazyimg.core.hedging import (
    BUDGET_MAX,
    BUDGET_SHARE,
    DELAY_MIN_S,
    SAMPLES_MAX,
    SAMPLES_MIN,
    SAMPLES_PER_MEASURE,
    Hedging,
)


def test_nothing_is_known_of_few() -> None:
    """A handful of answers is no measure."""
    hedging = Hedging()
    for _ in range(SAMPLES_MIN - 1):
        hedging.answered(1)
    assert hedging.delay_s is None
    hedging.answered(1)
    assert hedging.delay_s == 1


def test_delay_is_longer_than_nearly_all_took() -> None:
    """One slow answer in two hundred does not count, three do."""
    hedging = Hedging()
    for number in range(400):
        hedging.answered(9 if number % 200 == 0 else 0.2)
    assert hedging.delay_s == 0.2
    for number in range(400):
        hedging.answered(9 if number % 50 == 0 else 0.2)
    assert hedging.delay_s == 9


def test_delay_follows_the_server() -> None:
    """What was long ago is forgotten, and a server quicker than the shortest delay is not asked sooner."""
    hedging = Hedging()
    for _ in range(SAMPLES_MAX):
        hedging.answered(3)
    for _ in range(SAMPLES_MAX + SAMPLES_PER_MEASURE):
        hedging.answered(0.001)
    assert hedging.delay_s == DELAY_MIN_S


def test_second_requests_are_a_small_share() -> None:
    """[I5] However slow a server is: of a thousand requests at most fifty are sent twice, few in a row."""
    hedging = Hedging()
    taken = 0
    for _ in range(1000):
        hedging.asked()
        taken += hedging.take()
    assert taken <= 1000 * BUDGET_SHARE
    for _ in range(1000):
        hedging.asked()
    assert sum(hedging.take() for _ in range(100)) == BUDGET_MAX
