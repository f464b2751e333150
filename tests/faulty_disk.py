"""A disk that fails on request: `passthrough_fs.py` as a process, mounted, told over its socket what to do.

    disk.strike("read", path="chunks/*", error=errno.EIO)      those reads fail until disk.heal()
    disk.strike(*CHANGES, *SYNCS, error=errno.EROFS)           as after a read-only remount
    disk.strike("write", "fsync", hang=True)                   these wait until disk.heal()
    disk.strike("read", delay_s=0.2)                           a slow disk
    disk.strike("fsync", error=errno.EIO, count=1)             only the next one

`disk.path` is the mounted folder, to put a cache in; `disk.lower` is the same folder beneath it, whose files a test
may look at and change while operations hang.
"""

from __future__ import annotations

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from disk_strikes import CHANGES, LOOKS, SYNCS
from real_mount import is_mounted

from lazyimg.demo.programs import wait_first_line

__all__ = ["CHANGES", "LOOKS", "SYNCS", "FaultyDisk"]

START_TIMEOUT_S = 60
END_TIMEOUT_S = 30
# The connection's limit of background requests, raised where the kernel lets us: 12 reads that hang would stop
# all others, which no real disk does.
BACKGROUND_MAX = 4096


class FaultyDisk:
    """One mounted pass-through file system; healthy at first.  `record`: where its record goes, if any."""

    def __init__(self, folder: Path, record: Path | None = None) -> None:
        self.lower, self.path = folder / "lower", folder / "disk"
        self.record = record
        for one in (self.lower, self.path):
            one.mkdir(mode=0o700, parents=True)
        self._control = folder / "disk.sock"
        command = [sys.executable, Path(__file__).with_name("passthrough_fs.py")]
        command += [self.lower, self.path, self._control, *(["--record", record] if record else [])]
        # Where a script's own folder is not looked in (PYTHONSAFEPATH), what lies beside it is found all the same.
        environ = os.environ | {"PYTHONPATH": os.fspath(Path(__file__).parent)}
        self._process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=environ)
        try:
            wait_first_line(self._process, "the faulty disk", timeout_s=START_TIMEOUT_S)
        except BaseException:
            with self._process:
                self._process.kill()
            raise
        _raise_background_limit(self.path)

    def strike(
        self,
        *ops: str,
        path: str = "*",
        error: int = 0,
        hang: bool = False,
        delay_s: float = 0,
        count: int | None = None,
    ) -> None:
        """Strike these operations (all if none is named) on matching paths from now on; see passthrough_fs."""
        self._ask(do="strike", ops=ops, path=path, error=error, hang=hang, delay_s=delay_s, count=count)

    def heal(self) -> None:
        """End all strikes; what hangs goes on."""
        self._ask(do="heal")

    def mark(self, text: str) -> None:
        """Write a mark into the record."""
        self._ask(do="mark", text=text)

    @property
    def hanging(self) -> int:
        """Requests that hang now."""
        count: int = self._ask(do="status")["hanging"]
        return count

    @property
    def struck(self) -> int:
        """Requests that were struck so far."""
        count: int = self._ask(do="status")["struck"]
        return count

    def records(self) -> Iterator[tuple[Any, ...]]:
        """Return what was recorded so far."""
        assert self.record is not None
        with self.record.open("rb") as file:
            while True:
                try:
                    yield pickle.load(file)
                except EOFError:
                    return

    def end(self) -> None:
        """Heal, unmount and end the process, whatever state it is in."""
        if self._process.poll() is None:
            self.heal()
        while is_mounted(self.path):
            subprocess.run(["fusermount3", "-u", "-z", str(self.path)], check=True)
        with self._process as process:
            try:
                process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                # Somebody still has a file open there.
                process.kill()

    def _ask(self, **request: object) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(END_TIMEOUT_S)
            connection.connect(str(self._control))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as replies:
                reply: dict[str, Any] = json.loads(replies.readline())
        assert "error" not in reply, reply
        return reply


def _raise_background_limit(path: Path) -> None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] == str(path):
            limit = Path(f"/sys/fs/fuse/connections/{words[2].partition(':')[2]}/max_background")
            if os.access(limit, os.W_OK):
                limit.write_text(str(BACKGROUND_MAX))
