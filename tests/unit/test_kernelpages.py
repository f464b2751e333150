"""The kernel is told to forget, in a thread, and no failure of that ends anything."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pyfuse3
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from lazyimg.daemon.kernelpages import KernelPages


class Kernel:
    """Stands for pyfuse3.invalidate_inode: blocks until it is let go, as the kernel may; never for pages."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.threads: set[int] = set()
        self.go = threading.Event()
        self.error: Exception | None = None
        monkeypatch.setattr(pyfuse3, "invalidate_inode", self.invalidate)

    def invalidate(self, inode: int, *, attr_only: bool) -> None:
        # To have it drop pages would wait for reads of them in flight.
        assert attr_only
        self.asked.append(inode)
        self.threads.add(threading.get_ident())
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


async def settle(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await wait_all_tasks_blocked(0.001)


async def test_forgetting_never_blocks_the_loop(kernel: Kernel, nursery: trio.Nursery) -> None:
    """[I6] The kernel may wait for what only the loop answers: so another thread tells it."""
    pages = KernelPages(nursery)
    pages.forget_nowait(7)
    await settle(lambda: kernel.asked == [7])
    assert threading.get_ident() not in kernel.threads
    kernel.go.set()


async def test_what_is_found_meanwhile_is_forgotten_again(kernel: Kernel) -> None:
    """Pages that came after a forgetting began are forgotten by the next, however often it is asked for."""
    async with trio.open_nursery() as nursery:
        pages = KernelPages(nursery)
        pages.forget_nowait(7)
        await settle(lambda: kernel.asked == [7])
        for _ in range(5):
            pages.forget_nowait(7)
        await settle(lambda: kernel.asked == [7, 7])
        kernel.go.set()
    assert kernel.asked == [7, 7]


async def test_each_time_shows_another_mtime(kernel: Kernel, nursery: trio.Nursery) -> None:
    """[I1] What makes a reader drop its pages is an mtime that has not been shown since they came."""
    pages = KernelPages(nursery)
    kernel.go.set()
    shown = [pages.mtime_shift_ns(7)]
    for _ in range(3):
        pages.forget_nowait(7)
        shown.append(pages.mtime_shift_ns(7))
    assert shown == sorted(set(shown))
    assert pages.mtime_shift_ns(8) == 0
    await settle(lambda: bool(kernel.asked))


@pytest.mark.parametrize("error", [OSError(errno.ENOENT, "unknown"), RuntimeError("no session")])
async def test_no_failure_ends_the_daemon(
    kernel: Kernel, error: Exception, expected_warnings: Callable[..., None]
) -> None:
    """[I6] An inode that the kernel does not know has no pages; anything else is told in the log."""
    if isinstance(error, RuntimeError):
        expected_warnings("inode 7: the kernel was not told to forget it")
    kernel.error = error
    kernel.go.set()
    async with trio.open_nursery() as nursery:
        KernelPages(nursery).forget_nowait(7)
    assert kernel.asked == [7]
