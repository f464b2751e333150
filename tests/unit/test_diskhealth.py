"""The gate to the cache's disk: what hangs holds nobody, what fails ends its use, and probes bring it back."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.diskstate import GOOD_PROBES, PROBE_PAUSE_S
from lazyimg.errors import ChunkUnreadable
from lazyimg.image.diskhealth import DiskHealth

TIMEOUT_S = 10


class Rig:
    """A disk that hangs or fails when a test says so, and a clock that a test turns."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.now_s = 0.0
        self.error: Exception | None = None
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.calls = self.probes = 0
        self.limiter = trio.CapacityLimiter(4)
        self.disk = DiskHealth(Path("/disk"), self.probe, timeout_s=TIMEOUT_S, clock=lambda: self.now_s)
        self.nursery = nursery
        self.errors: list[OSError] = []

    def operate(self) -> str:
        self.calls += 1
        assert self.goes_on.wait(60)
        if self.error is not None:
            raise self.error
        return "done"

    def probe(self) -> None:
        self.probes += 1
        if self.error is not None:
            raise self.error

    async def read(self) -> str:
        return await self.disk.read(self.operate, limiter=self.limiter)

    async def write(self) -> str:
        return await self.disk.write(self.operate, limiter=self.limiter)

    async def try_write(self) -> None:
        try:
            await self.write()
        except OSError as exc:
            self.errors.append(exc)

    async def hang(self, count: int = 1) -> None:
        """Have so many operations hang, and wait until they do in as many threads as there are."""
        self.goes_on.clear()
        for _ in range(count):
            self.nursery.start_soon(self.try_write)
        while self.calls < min(count, self.limiter.total_tokens):
            await wait_all_tasks_blocked(0.001)

    async def go_on(self) -> None:
        """Let what hangs come to its end."""
        self.goes_on.set()
        while self.limiter.borrowed_tokens:
            await wait_all_tasks_blocked(0.001)

    async def look(self, later_s: float) -> None:
        """Look again after so long, and let the probe, if one is made, end."""
        self.now_s += later_s
        async with trio.open_nursery() as nursery:
            self.disk.look(nursery)

    @property
    def state(self) -> str:
        return self.disk.statistics().state


@pytest.fixture
def rig(nursery: trio.Nursery) -> Iterator[Rig]:
    rig = Rig(nursery)
    yield rig
    rig.goes_on.set()


async def test_good_disk_is_only_a_thread_away(rig: Rig) -> None:
    """A disk that is well gives and takes, and is not probed."""
    assert (await rig.read(), await rig.write()) == ("done", "done")
    await rig.look(1000)
    assert (rig.state, rig.probes) == ("normal", 0)


async def test_fault_is_counted_and_said_once(
    rig: Rig, caplog: pytest.LogCaptureFixture, expected_warnings: Callable[..., None]
) -> None:
    """A fault reaches who asked, is counted, and is logged with each change of state, not with each fault."""
    expected_warnings("injected; used on", "injected; not used from here on")
    rig.error = OSError(errno.EIO, "injected")
    asked = 0
    with caplog.at_level(logging.INFO, "lazyimg"):
        while rig.disk.may_read:
            with pytest.raises(OSError, match="injected"):
                await rig.read()
            asked += 1
        for _ in range(5):
            with pytest.raises(OSError, match=r"bypassed since .*injected"):
                await rig.read()
    assert rig.calls == asked
    assert rig.disk.statistics().errors == asked
    assert len(caplog.records) == 2


async def test_unreadable_chunk_is_the_disks_fault(rig: Rig, expected_warnings: Callable[..., None]) -> None:
    """What the store says of chunks that the disk does not read counts as the fault that caused it."""
    expected_warnings("used on and watched")
    rig.error = ChunkUnreadable("chunk 1 cannot be read", [1])
    rig.error.__cause__ = OSError(errno.EIO, "injected")
    with pytest.raises(ChunkUnreadable):
        await rig.read()
    assert rig.disk.statistics().last_error == "[Errno 5] injected"


async def test_full_disk_is_no_fault(rig: Rig) -> None:
    """ENOSPC goes to who asked, and says nothing against the disk."""
    rig.error = OSError(errno.ENOSPC, "injected")
    for _ in range(10):
        with pytest.raises(OSError, match="injected"):
            await rig.write()
    assert rig.state == "normal"


async def test_hanging_operation_holds_nobody(rig: Rig, expected_warnings: Callable[..., None]) -> None:
    """[I6] After disk_timeout all who wait for a disk that hangs are told, those who wait for its threads too."""
    expected_warnings("operate takes longer than 10 s; not used from here on")
    await rig.hang(9)
    await rig.look(TIMEOUT_S - 1)
    assert (rig.state, rig.errors) == ("normal", [])
    await rig.look(2)
    await wait_all_tasks_blocked()
    assert [exc.errno for exc in rig.errors] == [errno.ETIMEDOUT] * 9
    statistics = rig.disk.statistics()
    assert (statistics.state, statistics.stuck_operations) == ("bypass", 4)


async def test_nothing_is_begun_while_something_hangs(
    rig: Rig, expected_warnings: Callable[..., None]
) -> None:
    """[I5] Threads that hang are no more than were there when it began: neither reads, writes nor probes are added."""
    expected_warnings("takes longer")
    await rig.hang()
    await rig.look(TIMEOUT_S + 1)
    for _ in range(20):
        with pytest.raises(OSError, match="bypassed"):
            await rig.read()
        with pytest.raises(OSError, match="bypassed"):
            await rig.write()
        await rig.look(100)
    assert (rig.calls, rig.probes) == (1, 0)


async def test_disk_that_goes_on_comes_back_by_itself(
    rig: Rig, expected_warnings: Callable[..., None]
) -> None:
    """Once nothing hangs any more probes are made, and lead over unstable to normal."""
    expected_warnings("takes longer", "used on and watched")
    await rig.hang()
    await rig.look(TIMEOUT_S + 1)
    await rig.go_on()
    states = []
    for _ in range(GOOD_PROBES):
        await rig.look(PROBE_PAUSE_S)
        states.append(rig.state)
    assert states == ["unstable", "unstable", "normal"]
    assert rig.probes == GOOD_PROBES
    assert await rig.read() == "done"
    assert rig.disk.statistics().stuck_operations == 0


async def test_busy_threads_are_no_fault(rig: Rig) -> None:
    """Who gets no thread within disk_timeout is told so, but a disk that is only slow stays normal."""
    rig.limiter.total_tokens = 1
    await rig.hang()
    rig.now_s += 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.try_write)
        await wait_all_tasks_blocked()
        await rig.go_on()
        # Somebody else's operation, begun only now.
        await rig.limiter.acquire_on_behalf_of(nursery)
        nursery.start_soon(rig.try_write)
        await wait_all_tasks_blocked()
        await rig.look(TIMEOUT_S + 1)
    rig.limiter.release_on_behalf_of(nursery)
    assert [exc.errno for exc in rig.errors] == [errno.ETIMEDOUT]
    assert rig.state == "normal"


async def test_read_only_disk_refuses_writes_alone(rig: Rig, expected_warnings: Callable[..., None]) -> None:
    """After EROFS nothing is written until a probe can, and reads go on."""
    expected_warnings("read and not written", "used on and watched")
    rig.error = OSError(errno.EROFS, "injected")
    with pytest.raises(OSError, match="injected"):
        await rig.write()
    rig.error = None
    with pytest.raises(OSError, match="read-only") as caught:
        await rig.write()
    assert caught.value.errno == errno.EROFS
    assert await rig.read() == "done"
    await rig.look(PROBE_PAUSE_S)
    assert await rig.write() == "done"


async def test_waiting_for_the_disk_ends_with_its_return(
    rig: Rig, expected_warnings: Callable[..., None]
) -> None:
    """A block that runs because the disk is bypassed is left when the disk is used again, and not before."""
    expected_warnings("takes longer", "used on and watched")
    with rig.disk.until_back():
        await trio.lowlevel.checkpoint()
    await rig.hang()
    await rig.look(TIMEOUT_S + 1)
    ended = trio.Event()

    async def wait() -> None:
        with rig.disk.until_back():
            await trio.sleep_forever()
        ended.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await rig.go_on()
        await wait_all_tasks_blocked()
        assert not ended.is_set()
        await rig.look(PROBE_PAUSE_S)
    assert ended.is_set()


async def test_write_ends_before_its_cancellation_and_read_does_not(rig: Rig) -> None:
    """A write that was begun is done when its caller goes on; a reader who leaves waits for nothing."""
    rig.goes_on.clear()
    ended: list[str] = []

    async def run(name: str, operation: Callable[[], object]) -> None:
        try:
            await operation()  # type: ignore[misc]  # it is a coroutine function
        finally:
            ended.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run, "read", rig.read)
        nursery.start_soon(run, "write", rig.write)
        while rig.calls < 2:
            await wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await wait_all_tasks_blocked()
        assert ended == ["read"]
        rig.goes_on.set()
    assert ended == ["read", "write"]
    await rig.go_on()


async def test_what_hangs_does_not_keep_the_daemon_from_its_end(
    rig: Rig, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """[I6] Cancelled while a write hangs, the daemon waits for that no longer than disk_timeout."""
    expected_warnings("takes longer")
    rig.goes_on.clear()
    async with rig.disk.watched(), trio.open_nursery() as nursery:
        nursery.start_soon(rig.try_write)
        while not rig.calls:
            await wait_all_tasks_blocked(0.001)
        nursery.cancel_scope.cancel()
        rig.now_s += TIMEOUT_S + 1
    assert rig.errors[0].errno == errno.ETIMEDOUT


async def test_bug_in_a_probe_ends_nothing(rig: Rig, expected_warnings: Callable[..., None]) -> None:
    """[I6] An unforeseen exception of the probe is logged, and the disk counts as bad."""
    expected_warnings("used on and watched", "failed in an unforeseen way", "not used", required=False)
    rig.error = OSError(errno.EIO, "injected")
    with pytest.raises(OSError, match="injected"):
        await rig.read()
    rig.error = RuntimeError("a bug")
    for _ in range(5):
        await rig.look(PROBE_PAUSE_S * 20)
    assert rig.probes == 5
    assert rig.state != "normal"


async def test_disk_is_asked_before_the_end(
    rig: Rig, autojump_clock: MockClock, expected_warnings: Callable[..., None]
) -> None:
    """A disk that fails still answers; one that hangs does not, and is not asked a second time."""
    expected_warnings("takes longer")
    assert await rig.disk.still_answers()
    rig.error = OSError(errno.EIO, "injected")
    assert await rig.disk.still_answers()
    rig.error = None
    await rig.hang()
    rig.now_s += TIMEOUT_S + 1
    async with rig.disk.watched():
        await wait_all_tasks_blocked()
        assert not await rig.disk.still_answers()
