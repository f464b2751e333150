"""A daemon that is a script, and the outcome of a run of the command line."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from lazyimg.control import ImageFacts, Progress
from lazyimg.core.identity import base_name

IMAGE_ID = "11111111-2222-3333-4444-555555555555"
CONTENT = b"raw image " * 1000
# A name that would draw, colour and break lines if it were let.
HOSTILE = "a\n\x1b[31mb[red]c[/red]\r\u202e"


class ScriptedDaemon:
    """Has one image below a folder that stands for the mount."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.fails: Exception | None = None
        self.steps: list[Progress] = [Progress(50, 100), Progress(100, 100)]
        self.hangs = False
        # Of the status.
        self.more: dict[str, object] = {}
        self.pid = 77
        self.is_working = threading.Event()
        self.has_stopped = threading.Event()

    def status(self) -> dict[str, object]:
        if self.fails:
            raise self.fails
        image = {
            "id": IMAGE_ID,
            "name": HOSTILE,
            "size_bytes": len(CONTENT),
            "present_bytes": 4096,
            "fetched_bytes": 5000,
            "requests": 3,
            "source": "ranges",
            "open_handles": 1,
            "missing_bytes": len(CONTENT) - 4096,
            "at_risk": True,
            "state": "partial",
        }
        return {"daemon_pid": self.pid, "images": [image], **self.more}

    async def image_facts(self, image: str) -> ImageFacts:
        if self.fails:
            raise self.fails
        return ImageFacts(
            id=IMAGE_ID,
            name=HOSTILE,
            base_name=base_name(IMAGE_ID),
            disk_format="raw",
            container_format="bare",
            size_bytes=len(CONTENT),
            presented_size_bytes=len(CONTENT),
            presented_format="raw",
            view="stored",
            mountpoint=str(self.mount),
            os_hash_algo="sha512",
            os_hash_value=hashlib.sha512(CONTENT).hexdigest(),
        )

    async def evict(self, image: str) -> int:
        if self.fails:
            raise self.fails
        return 4096

    async def restart(self) -> int:
        if self.fails:
            raise self.fails
        self.pid += 1
        return self.pid - 1

    async def give_up_mount(self) -> int:
        return self.pid

    async def prefetch(self, image: str) -> AsyncIterator[Progress]:
        for step in self.steps:
            yield step
        if self.fails:
            raise self.fails
        if self.hangs:
            self.is_working.set()
            try:
                await trio.sleep_forever()
            finally:
                self.has_stopped.set()

    def verify(self, image: str) -> AsyncIterator[Progress]:
        return self.prefetch(image)


class Outcome:
    """What a run printed, and its exit code."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
