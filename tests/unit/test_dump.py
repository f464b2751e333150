"""The dump of what the daemon is doing: every task by its place, and no values."""

from __future__ import annotations

import trio
from trio.testing import wait_all_tasks_blocked

from lazyimg.daemon.dump import READS_MAX, STACKS_MAX, dump_lines
from lazyimg.daemon.inflight import InFlight

SECRET = "token-5f2a"


async def waits_here(secret: str) -> None:
    await trio.sleep_forever()


async def test_tasks_are_told_by_their_place(nursery: trio.Nursery) -> None:
    """Many tasks that wait in one place are one entry with their number, and its frames; no value is told."""
    for _ in range(500):
        nursery.start_soon(waits_here, SECRET)
    await wait_all_tasks_blocked()
    lines = list(dump_lines(InFlight({})))
    at = next(i for i, line in enumerate(lines) if "waits_here" in line)
    assert lines[at].startswith("500 x ")
    assert "unit/test_dump.py:" in lines[at + 1]
    assert lines[at + 1].endswith(" waits_here")
    assert SECRET not in "\n".join(lines)
    assert lines[-1] == "end of dump"


async def test_reads_are_told_and_bounded(mock_clock: trio.abc.Clock) -> None:
    """[I5] The oldest reads are told with what they wait for, whatever their number."""
    in_flight = InFlight({})
    for start in range(400):
        in_flight.begin_read(1 << 62, start * 4096, 4096)
    lines = list(dump_lines(in_flight))
    told = [line for line in lines if "waits for upper" in line]
    assert len(told) == READS_MAX
    assert told[0].strip() == "upper folder: [0, 4096) for 0.0 s, waits for upper, 0 retries"
    assert "400 reads wait" in "\n".join(lines)


async def test_places_are_bounded(nursery: trio.Nursery) -> None:
    """[I5] However many places tasks wait in, only so many are told."""
    for number in range(STACKS_MAX + 50):
        nursery.start_soon(waits_here, SECRET, name=f"task {number}")
    await wait_all_tasks_blocked()
    lines = list(dump_lines(InFlight({})))
    assert sum(" x " in line for line in lines) == STACKS_MAX
