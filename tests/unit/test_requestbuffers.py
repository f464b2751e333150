"""A request's buffer is in memory before the kernel copies into it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from lazyimg.daemon import requestbuffers
from lazyimg.daemon.requestbuffers import BUFFER_BYTES, HEADERS_BYTES, RequestBuffers

WRITE_BYTES_MAX = 256 << 10
PAGE = mmap.PAGESIZE

libc = ctypes.PyDLL(None, use_errno=True)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)
libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


def resident_bytes(address: int) -> int:
    """Return how much of a buffer is in memory, from its start to the first page that is not."""
    start = address & -PAGE
    count = -(-(address + BUFFER_BYTES - start) // PAGE)
    pages = ctypes.create_string_buffer(count)
    assert libc.mincore(start, count * PAGE, pages) == 0
    present = 0
    while present < count and pages.raw[present] & 1:
        present += 1
    return start + present * PAGE - address


@pytest.fixture
def allocated() -> Iterator[list[int]]:
    """Addresses to be freed."""
    addresses: list[int] = []
    yield addresses
    for address in addresses:
        libc.free(address)


def allocate(allocated: list[int]) -> int:
    """As libfuse does at a task's first request."""
    allocated.append(libc.malloc(BUFFER_BYTES))
    return resident_bytes(allocated[-1])


async def test_next_buffer_is_in_memory(allocated: list[int]) -> None:
    """[I9] Each task's buffer has room in memory for a write of the largest size, of many tasks at once."""
    buffers = RequestBuffers(WRITE_BYTES_MAX)
    sizes: list[int] = []

    async def take_requests() -> None:
        buffers.prepare()
        sizes.append(allocate(allocated))
        # No other is prepared for a task that has its own.
        before = len(allocated)
        buffers.prepare()
        assert len(allocated) == before
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(take_requests)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(sizes) == 30
    assert min(sizes) >= WRITE_BYTES_MAX + HEADERS_BYTES
    # Nobody prepared this one, and what is above is no chance.
    assert min(allocate(allocated) for _ in range(30)) < WRITE_BYTES_MAX


async def test_what_is_in_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, allocated: list[int]) -> None:
    """While more tasks wait than have room for a write, the others have it for any other request."""
    touched: list[int] = []
    monkeypatch.setattr(requestbuffers, "touch_next_buffer", touched.append)
    monkeypatch.setattr(requestbuffers, "WHOLE_MAX", 2)
    buffers = RequestBuffers(WRITE_BYTES_MAX)

    async def take_requests(*, wait: bool) -> None:
        buffers.prepare()
        if wait:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: take_requests(wait=True))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert touched == [WRITE_BYTES_MAX + HEADERS_BYTES] * 2 + [HEADERS_BYTES]


def test_mount_with_larger_writes_gets_no_more_than_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount whose kernel was promised more than the buffer holds touches nothing behind it."""
    touched: list[int] = []
    monkeypatch.setattr(requestbuffers, "touch_next_buffer", touched.append)

    async def take_request() -> None:
        RequestBuffers(8 << 20).prepare()

    trio.run(take_request)
    assert touched == [BUFFER_BYTES]
