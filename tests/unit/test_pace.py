"""How fast background work may go."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lazyimg.core.pace import Pace


def test_no_limit_never_waits() -> None:
    """Zero bytes a second is no limit."""
    pace = Pace(0)
    pace.spend(1 << 40, 0.0)
    assert pace.wait_s(0.0) == 0


def test_what_was_spent_is_paid_for() -> None:
    """After 100 bytes at 50 a second two seconds pass before the next; idle time is not saved up."""
    pace = Pace(50)
    assert pace.wait_s(7.0) == 0
    pace.spend(100, 7.0)
    assert pace.wait_s(7.0) == 2
    assert pace.wait_s(8.5) == 0.5
    pace.spend(100, 1000.0)
    assert pace.wait_s(1000.0) == 2


@given(st.lists(st.integers(1, 10_000), min_size=1), st.integers(1, 1000))
def test_average_is_never_above_the_limit(sizes: list[int], bytes_per_s: int) -> None:
    """Whoever waits as told has, when the last wait is over, spent no more than the limit allows."""
    pace = Pace(bytes_per_s)
    now_s = 0.0
    for size in sizes:
        now_s += pace.wait_s(now_s)
        pace.spend(size, now_s)
    assert now_s + pace.wait_s(now_s) >= sum(sizes) / bytes_per_s - 1e-6
