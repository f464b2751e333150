"""Handles that nobody has are told from those that somebody has, whatever happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lazyimg.daemon.handles import Handles, make_table
from lazyimg.daemon.lostopens import LostOpens

INODE = 7


class Kernel:
    """Knows the inodes in `known`; an answer, of that instant, comes once it is let go."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.asked: list[int] = []
        self.go = trio.Event()
        self.go.set()

    async def is_known(self, inode: int) -> bool:
        self.asked.append(inode)
        answer = inode in self.known
        await self.go.wait()
        return answer


class Rig:
    def __init__(self) -> None:
        self.handles = Handles(make_table())
        self.kernel = Kernel()
        self.error: Exception | None = None
        self.lost_opens = LostOpens(self.handles, self.kernel.is_known, self.take_back)

    async def take_back(self, inode: int, count: int) -> None:
        if self.error is not None:
            raise self.error
        for _ in range(count):
            self.handles.closed(inode)

    def opened(self, count: int) -> None:
        for _ in range(count):
            self.handles.opened(INODE)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_what_the_kernel_does_not_know_has_no_handle(rig: Rig) -> None:
    """[I7] All handles of a forgotten inode are taken back."""
    rig.opened(3)
    assert rig.lost_opens.may_have(INODE)
    await rig.lost_opens.look_into(INODE)
    assert not rig.lost_opens.may_have(INODE)


async def test_what_the_kernel_knows_keeps_its_handles(rig: Rig) -> None:
    """[I9] A file that may be open stays so, however often it was forgotten (a lookup can fail in the kernel)."""
    rig.opened(2)
    rig.kernel.known.add(INODE)
    await rig.lost_opens.look_into(INODE)
    await rig.lost_opens.look_into_all()
    assert rig.handles.count(INODE) == 2


async def test_nothing_counted_asks_nobody(rig: Rig) -> None:
    """An inode without handles costs no question."""
    await rig.lost_opens.look_into(INODE)
    await rig.lost_opens.look_into_all()
    assert not rig.kernel.asked


async def test_release_under_way_is_waited_for(rig: Rig, nursery: trio.Nursery) -> None:
    """[I9] What the kernel gave back, and is not counted yet, is not taken back as well."""
    rig.opened(1)
    rig.lost_opens.release_begins(INODE)
    nursery.start_soon(rig.lost_opens.look_into, INODE)
    await wait_all_tasks_blocked()
    assert not rig.kernel.asked
    rig.handles.closed(INODE)
    # Known again, and opened, before it is looked into.
    rig.kernel.known.add(INODE)
    rig.opened(1)
    rig.lost_opens.release_ended(INODE)
    await wait_all_tasks_blocked()
    assert rig.handles.count(INODE) == 1


async def test_opened_while_the_kernel_answers(rig: Rig, nursery: trio.Nursery) -> None:
    """[I9] A handle that came after the kernel was asked stays."""
    rig.opened(2)
    rig.kernel.go = trio.Event()
    nursery.start_soon(rig.lost_opens.look_into, INODE)
    await wait_all_tasks_blocked()
    rig.opened(1)
    rig.kernel.go.set()
    await wait_all_tasks_blocked()
    assert rig.handles.count(INODE) == 1


async def test_opened_and_released_while_the_kernel_answers(rig: Rig, nursery: trio.Nursery) -> None:
    """[I9] A release in between may be of one that was counted: the kernel is asked once more."""
    rig.opened(2)
    rig.kernel.go = trio.Event()
    nursery.start_soon(rig.lost_opens.look_into, INODE)
    await wait_all_tasks_blocked()
    rig.kernel.known.add(INODE)
    rig.opened(2)
    rig.lost_opens.release_begins(INODE)
    rig.handles.closed(INODE)
    rig.lost_opens.release_ended(INODE)
    rig.kernel.go.set()
    await wait_all_tasks_blocked()
    assert rig.kernel.asked == [INODE, INODE]
    assert rig.handles.count(INODE) == 3


async def test_forgotten_again_while_the_kernel_answers(rig: Rig, nursery: trio.Nursery) -> None:
    """Looked into twice at once, handles are taken back once."""
    rig.opened(2)
    rig.kernel.go = trio.Event()
    for _ in range(2):
        nursery.start_soon(rig.lost_opens.look_into, INODE)
    await wait_all_tasks_blocked()
    rig.kernel.go.set()
    await wait_all_tasks_blocked()
    assert rig.handles.count(INODE) == 0


async def test_failure_ends_nothing(rig: Rig, expected_warnings: Callable[..., None]) -> None:
    """[I6] What cannot be taken back stays counted, until it is looked into again."""
    expected_warnings("were not taken back")
    rig.opened(1)
    rig.error = OSError("disk")
    await rig.lost_opens.look_into(INODE)
    assert rig.handles.count(INODE) == 1
    rig.error = None
    await rig.lost_opens.look_into(INODE)
    assert rig.handles.count(INODE) == 0
