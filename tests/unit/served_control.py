"""A control server whose Daemon is a script, and a client of it in another thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio
from outcome import capture

from lazyimg.control import ControlClient, ImageFacts, Progress, serve_control

FACTS = ImageFacts(
    id="11111111-2222-3333-4444-555555555555",
    name="debian 12/ü",
    base_name="0" * 40,
    disk_format="qcow2",
    container_format="bare",
    size_bytes=123,
    presented_size_bytes=123,
    presented_format="qcow2",
    view="stored",
    mountpoint="/mnt/_base",
    min_disk_gib=2,
    properties={"kernel_id": "k"},
)


class ScriptedDaemon:
    """Answers what the test says; `fails` is raised by every question."""

    def __init__(self, fails: Exception | None = None, steps: tuple[Progress, ...] = ()) -> None:
        self.fails = fails
        self.steps = steps
        self.asked: list[str] = []
        self.work_began = trio.Event()
        self.work_stopped = trio.Event()

    def _answer(self, image: str) -> None:
        self.asked.append(image)
        if self.fails:
            raise self.fails

    def status(self) -> dict[str, object]:
        self._answer("")
        return {"daemon_pid": 7, "images": []}

    async def image_facts(self, image: str) -> ImageFacts:
        self._answer(image)
        return FACTS

    async def evict(self, image: str) -> int:
        self._answer(image)
        return 4096

    async def restart(self) -> int:
        self._answer("")
        return 7

    async def give_up_mount(self) -> int:
        self._answer("")
        return 7

    async def wait_for_ever(self, image: str) -> int:
        self.asked.append(image)
        await trio.sleep_forever()
        raise AssertionError

    async def prefetch(self, image: str) -> AsyncIterator[Progress]:
        for step in self.steps:
            yield step
        self._answer(image)

    async def verify(self, image: str) -> AsyncIterator[Progress]:
        """Yield once and go on for ever: what stops it is the client."""
        yield Progress(1, 2)
        self.work_began.set()
        try:
            await trio.sleep_forever()
        finally:
            self.work_stopped.set()


@asynccontextmanager
async def serving(daemon: ScriptedDaemon, path: Path, mode: int = 0o600) -> AsyncIterator[trio.CancelScope]:
    """A server that answers inside the block and has ended after it; its scope ends it earlier."""
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, daemon, path, mode=mode, group=None))
        try:
            yield nursery.cancel_scope
        finally:
            nursery.cancel_scope.cancel()


async def served(daemon: ScriptedDaemon, path: Path, ask: Callable[[ControlClient], Any]) -> Any:
    """Return what a client in another thread gets from a server that ends afterwards."""
    async with serving(daemon, path):
        # Raised inside the nursery it would arrive wrapped in a group.
        outcome = await trio.to_thread.run_sync(capture, ask, ControlClient(path))
    return outcome.unwrap()
