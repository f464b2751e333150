"""Names are made, renamed, linked and removed while daemons are killed at random: once, or reported failed."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from real_mount import Mount
from served_glance import ServedGlance

from lazyimg.core.kernel import can_resend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not can_resend(os.uname().release), reason="Linux 6.9 is missing here: it sends requests again"
    ),
]

KILLS = 6
WORKERS = 4
# What the next daemon says of a thing that the killed one had done and not answered.
DONE_BEFORE = {errno.EEXIST, errno.ENOENT}


class Worker:
    """Changes names of its own in a folder that it shares, and notes what each call said."""

    def __init__(self, folder: Path, number: int, seed: int) -> None:
        self._folder = folder
        self._dice = random.Random(seed + number)
        self._number = number
        self.count = 0
        # Each name of ours that is there for certain, with its content, and those of which that is not known.
        self.there: dict[str, bytes] = {}
        self.unknown: set[str] = set()
        self.odd: list[str] = []

    def step(self) -> None:
        """Do one thing; what fails must have been done by a daemon that died over it."""
        self.count += 1
        name = f"w{self._number}-{self.count}"
        kind = self._dice.choice(("create", "create", "mkdir", "rename", "unlink", "link"))
        old = self._dice.choice(sorted(self.there)) if self.there else None
        if kind in ("create", "mkdir") or old is None:
            self._call(kind if kind == "mkdir" else "create", None, name)
        else:
            self._call(kind, old, name)

    def _call(self, kind: str, old: str | None, name: str) -> None:
        content = b"" if old is None else self.there.get(old, b"")
        try:
            if kind == "create":
                content = name.encode()
                with (self._folder / name).open("xb", buffering=0) as file:
                    file.write(content)
            elif kind == "mkdir":
                (self._folder / name).mkdir()
                (self._folder / name).rmdir()
                return
            elif kind == "unlink":
                (self._folder / (old or "")).unlink()
            elif kind == "rename":
                (self._folder / (old or "")).rename(self._folder / name)
            else:
                os.link(self._folder / (old or ""), self._folder / name)
        except OSError as exc:
            if exc.errno not in DONE_BEFORE:
                self.odd.append(f"{kind} {old} {name}: {exc!r}")
            for one in {old, name} - {None}:
                assert one is not None
                self.there.pop(one, None)
                self.unknown.add(one)
            return
        if kind in ("unlink", "rename"):
            del self.there[old or ""]
        if kind != "unlink":
            self.there[name] = content


def test_change_of_a_name_is_done_once_or_reported_failed(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] Whatever was reported done is there, with its content; whatever failed was EEXIST or ENOENT.

    four workers change names of their own   six kills at random instants   unmounted: the folder holds just that
    """
    mount = make_mount(glance)
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    folder = mount.path / "names"
    folder.mkdir()
    workers = [Worker(folder, number, seed) for number in range(WORKERS)]
    is_ending = threading.Event()

    def work(worker: Worker) -> None:
        while not is_ending.is_set():
            worker.step()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    dice = random.Random(seed)
    for _ in range(KILLS):
        time.sleep(dice.uniform(0, 0.3))
        mount.new_daemon(mount.kill_daemon())
    is_ending.set()
    for thread in threads:
        thread.join()
    assert mount.stop() == 0
    found = {path.name: path for path in folder.iterdir()}
    known: set[str] = set()
    for worker in workers:
        assert worker.odd == []
        assert worker.count > KILLS
        assert worker.there.keys() <= found.keys()
        for name, content in worker.there.items():
            assert found[name].read_bytes() == content, name
        known |= worker.there.keys() | worker.unknown
    assert {name for name, path in found.items() if path.is_file()} <= known
