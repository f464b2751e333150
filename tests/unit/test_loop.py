"""The quickened session loop: it takes what waits at once, lets others run, and never sends a task to read nothing."""

from __future__ import annotations

import importlib.metadata
import socket
from collections.abc import Iterator

import pyfuse3
import pytest
import trio
import trio.testing

from lazyimg.daemon.loop import FAIRNESS_REQUESTS, TRIED_VERSIONS, Gate, quicken
from lazyimg.daemon.requestbuffers import RequestBuffers


class Requests:
    """A descriptor that is readable while a request waits, and pyfuse3's own wait for it, counted."""

    gate: Gate

    def __init__(self) -> None:
        self.ours, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.ours.setblocking(False)
        # pyfuse3 lets one task at a time wait on the descriptor, as trio does.
        self._turn = trio.Lock()
        self.waits = 0
        self.is_ended = False
        # So often the wait ends for a request that is gone before the waiter's turn.
        self.taken_by_others = 0

    async def wait(self) -> bool:
        self.waits += 1
        if self.taken_by_others:
            self.taken_by_others -= 1
            return True
        async with self._turn:
            await trio.lowlevel.wait_readable(self.ours)
        return not self.is_ended

    def send(self) -> None:
        self.kernel.send(b"request")

    def take(self) -> bytes:
        """Raises BlockingIOError where none waits, which would end the mount."""
        return self.ours.recv(64)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Iterator[Requests]:
    made = Requests()
    monkeypatch.setattr(pyfuse3, "_wait_fuse_readable", made.wait)
    with made.ours, made.kernel:
        gate = quicken(made.ours.fileno(), RequestBuffers(1 << 18))
        assert gate is not None
        made.gate = gate
        yield made


async def wait_readable() -> bool:
    return bool(await pyfuse3._wait_fuse_readable())  # type: ignore[attr-defined]


async def test_waiting_request_is_taken_without_a_wait(requests: Requests) -> None:
    """A request that waits is seen by poll(2) alone."""
    requests.send()
    assert await wait_readable()
    assert requests.take()
    assert requests.waits == 0


async def test_others_get_their_turn(requests: Requests) -> None:
    """However many requests wait, every so many the loop lets trio run the other tasks [I6]."""
    for _ in range(2 * FAIRNESS_REQUESTS):
        requests.send()
        assert await wait_readable()
        requests.take()
    assert requests.waits == 2


async def test_task_whose_request_was_taken_waits_again(requests: Requests, nursery: trio.Nursery) -> None:
    """A task woken for a request that another has taken meanwhile does not read, which would end the mount [I6]."""
    requests.taken_by_others = 3
    taken = []

    async def reader() -> None:
        assert await wait_readable()
        taken.append(requests.take())

    nursery.start_soon(reader)
    await trio.testing.wait_all_tasks_blocked()
    assert requests.waits == 4
    assert not taken
    requests.send()
    await trio.testing.wait_all_tasks_blocked()
    assert taken == [b"request"]


async def test_end_of_the_session_is_passed_on(requests: Requests) -> None:
    """When pyfuse3 says that the session is over, the loop ends."""
    requests.is_ended = True
    for _ in range(FAIRNESS_REQUESTS):
        requests.send()
    answers = [await wait_readable() for _ in range(FAIRNESS_REQUESTS)]
    assert answers[-1] is False


def test_untried_pyfuse3_keeps_its_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that nobody tried is left as it is."""
    original = pyfuse3._wait_fuse_readable  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    assert not quicken(0, RequestBuffers(1 << 18))
    assert pyfuse3._wait_fuse_readable is original  # type: ignore[attr-defined]


def test_installed_pyfuse3_is_one_that_was_tried() -> None:
    """Here the quick loop is used, and the function it replaces is where it was."""
    assert importlib.metadata.version("pyfuse3").startswith(TRIED_VERSIONS)
    assert callable(pyfuse3._wait_fuse_readable)  # type: ignore[attr-defined]


async def test_shut_gate_lets_no_request_in(requests: Requests, nursery: trio.Nursery) -> None:
    """[I9] Behind a shut gate requests stay with the kernel, for the next daemon; opened again, they are taken."""
    taken = []

    async def reader() -> None:
        while await wait_readable():
            taken.append(requests.take())

    requests.send()
    nursery.start_soon(reader)
    await trio.testing.wait_all_tasks_blocked()
    assert len(taken) == 1
    requests.gate.shut()
    requests.send()
    await trio.testing.wait_all_tasks_blocked()
    assert len(taken) == 1
    assert requests.gate.resting == 1
    requests.gate.open()
    await trio.testing.wait_all_tasks_blocked()
    assert len(taken) == 2
    nursery.cancel_scope.cancel()


async def test_drained_when_no_request_is_left(requests: Requests, autojump_clock: object) -> None:
    """[I9] Draining waits for the requests that were taken, however long, and for those alone."""
    answered = trio.Event()
    drained_at: list[float] = []

    async def loop() -> None:
        assert await wait_readable()
        requests.take()
        await answered.wait()
        await wait_readable()

    async def drain(session: trio.lowlevel.Task) -> None:
        await requests.gate.wait_drained(session)
        drained_at.append(trio.current_time())

    async def session(task_status: trio.TaskStatus[trio.lowlevel.Task]) -> None:
        async with trio.open_nursery() as tasks:
            tasks.start_soon(loop)
            tasks.start_soon(wait_readable)
            task_status.started(trio.lowlevel.current_task())

    async with trio.open_nursery() as nursery:
        requests.send()
        task = await nursery.start(session)
        await trio.testing.wait_all_tasks_blocked()
        requests.gate.shut()
        began = trio.current_time()
        nursery.start_soon(drain, task)
        await trio.sleep(3)
        assert not drained_at
        answered.set()
        await trio.sleep(1)
        assert 3 <= drained_at[0] - began < 3.1
        nursery.cancel_scope.cancel()
