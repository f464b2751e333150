"""`lazyimg mount` as a user runs it, started and ended around a measurement."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine

from lazyimg.core.identity import ImageRecord

LAZYIMG = Path(sys.executable).with_name("lazyimg")


@dataclass(frozen=True)
class Mounted:
    """A daemon that is ready; `process_id` is what was started, the holder.  Its files are in `folder`."""

    folder: Path
    mountpoint: Path
    control: Path
    process_id: int

    @property
    def log(self) -> str:
        """What holder and daemons have said so far."""
        return (self.folder / "lazyimg.log").read_text(errors="replace")

    def image_path(self, record: ImageRecord) -> Path:
        """Return where the image is seen."""
        return self.mountpoint / record.base_name

    def status(self) -> dict[str, Any]:
        """Return what `lazyimg status --json` says."""
        words = machine.run(LAZYIMG, "status", "--json", "--control", self.control)
        result: dict[str, Any] = json.loads(words)
        return result

    def prefetch(self, record: ImageRecord) -> None:
        """Return when the whole image is in the cache."""
        machine.run(LAZYIMG, "prefetch", record.id, "--control", self.control, timeout_s=600)


@contextlib.contextmanager
def mount(
    endpoint: str, folder: Path, *, cache_dir: Path | None = None, may_be_replaced: bool = False
) -> Iterator[Mounted]:
    """Mount inside the block, with cache, control socket and log in `folder`; after it nothing is mounted.

    Ends the benchmark if the daemon was replaced meanwhile, unless that is what it is about.
    """
    mountpoint = folder / "_base"
    mountpoint.mkdir(parents=True, exist_ok=True)
    control = folder / "control.sock"
    log = folder / "lazyimg.log"
    cache_dir = cache_dir or folder / "cache"
    places = ("--endpoint", endpoint, "--cache-dir", cache_dir, "--control", control)
    with machine.background_process([LAZYIMG, "mount", mountpoint, *map(str, places)], log) as process:

        def is_ready() -> bool:
            if process.poll() is not None:
                sys.exit(f"lazyimg mount ended with {process.returncode}: {log.read_text().strip()}")
            asked: list[str | Path] = [LAZYIMG, "status", "--json", "--control", control]
            return subprocess.run(asked, capture_output=True, check=False).returncode == 0

        machine.wait_until(is_ready, f"lazyimg status on {control}")
        mounted = Mounted(folder, mountpoint, control, process.pid)
        daemon_id = mounted.status()["daemon_pid"]
        yield mounted
        if not may_be_replaced and mounted.status()["daemon_pid"] != daemon_id:
            sys.exit(f"the daemon ended and was replaced while it was measured:\n{log.read_text().strip()}")
    if mountpoint.is_mount():
        sys.exit(f"{mountpoint} is still mounted after lazyimg ended; its log is {log}")
