"""How far past a read to fetch."""

from __future__ import annotations

from lazyimg.core.readahead import GAP_BYTES_MAX, SEQUENCES_MAX, Readahead

KIB = 1 << 10
RANDOM = 256 * KIB
LIMIT = 8 << 20
FAR = 1 << 30


def readahead() -> Readahead:
    return Readahead(RANDOM, LIMIT)


def test_random_read_is_worth_a_small_window() -> None:
    """A read that belongs to no sequence asks for at most 256 KiB, or what it needs itself."""
    ahead = readahead()
    assert ahead.window_bytes(FAR, FAR + 4 * KIB, is_hit=False) == RANDOM
    assert ahead.window_bytes(5 * FAR, 5 * FAR + 1024 * KIB, is_hit=False) == 1024 * KIB


def test_window_of_a_sequence_doubles_to_the_limit() -> None:
    """Each read that continues a sequence doubles what is worth having, and never above the limit."""
    ahead = readahead()
    windows = [ahead.window_bytes(n * 128 * KIB, (n + 1) * 128 * KIB, is_hit=False) for n in range(100)]
    assert windows[:4] == [RANDOM, 512 * KIB, 768 * KIB, 1024 * KIB]
    assert windows == sorted(windows)
    assert windows[-1] == LIMIT


def test_interleaved_sequences_are_told_apart() -> None:
    """A boot reads from several places in turn; each keeps its own window."""
    ahead = readahead()
    for n in range(8):
        for place in range(SEQUENCES_MAX):
            start = place * FAR + n * 128 * KIB
            window = ahead.window_bytes(start, start + 128 * KIB, is_hit=False)
    assert window == 2 * 8 * 128 * KIB


def test_one_sequence_too_many_loses_the_oldest() -> None:
    """[I5] A few sequences are remembered, the least recently continued one is forgotten."""
    ahead = readahead()
    for place in range(SEQUENCES_MAX + 1):
        ahead.window_bytes(place * FAR, place * FAR + 512 * KIB, is_hit=False)
    assert ahead.window_bytes(512 * KIB, 516 * KIB, is_hit=False) == RANDOM
    assert ahead.window_bytes(2 * FAR + 512 * KIB, 2 * FAR + 1024 * KIB, is_hit=False) == 2048 * KIB


def test_hit_outside_a_sequence_is_worth_nothing() -> None:
    """Reads of what is here cause no fetching, unless they come towards the end of what is here."""
    ahead = readahead()
    assert ahead.window_bytes(FAR, FAR + 4 * KIB, is_hit=True) == 0
    assert ahead.window_bytes(3 * FAR, 3 * FAR + 4 * KIB, is_hit=True) == 0


def test_hit_in_a_sequence_keeps_ahead() -> None:
    """A sequence that finds its bytes present is kept ahead of, so that it never waits."""
    ahead = readahead()
    ahead.window_bytes(0, 512 * KIB, is_hit=False)
    assert ahead.window_bytes(512 * KIB, 1024 * KIB, is_hit=True) == 2048 * KIB


def test_small_gap_and_small_step_back_continue_a_sequence() -> None:
    """File systems skip a little, and the kernel's read-ahead reorders; neither is a new place."""
    ahead = readahead()
    ahead.window_bytes(FAR, FAR + 512 * KIB, is_hit=False)
    skipped = FAR + 512 * KIB + GAP_BYTES_MAX
    assert ahead.window_bytes(skipped, skipped + 4 * KIB, is_hit=False) > RANDOM
    assert ahead.window_bytes(skipped - 8 * KIB, skipped - 4 * KIB, is_hit=False) > RANDOM
    beyond = skipped + 4 * KIB + GAP_BYTES_MAX + 1
    assert ahead.window_bytes(beyond, beyond + 4 * KIB, is_hit=False) == RANDOM


def test_reading_the_same_again_does_not_grow_the_window() -> None:
    """Only what is read for the first time counts towards the length of a sequence."""
    ahead = readahead()
    ahead.window_bytes(0, 512 * KIB, is_hit=False)
    windows = {ahead.window_bytes(508 * KIB, 512 * KIB, is_hit=False) for _ in range(20)}
    assert windows == {1024 * KIB}
