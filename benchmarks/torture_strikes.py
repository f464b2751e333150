"""What strikes in torture.py, each kind from a thread and a chain of random numbers of its own.

    processes   kill -9 of the daemon, once or again before the next one is ready; kill -9 of the holder, or of both one
                after the other; `lazyimg restart`, undisturbed or with a kill -9; chunks damaged on disk, then kill -9
    Glance      ended and started, frozen, slow, lying, closing, refusing, rate-limiting, stalled
    cache       an image evicted
    disk        under the cache: EIO, ENOSPC, EROFS, slow, hanging

Between two strikes of a kind all is well for a while, so that whoever waits gets what he waits for.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import machine
from lazyimg_process import Mounted
from torture_images import CLUSTER_BYTES, TorturedImage
from torture_tally import Gate

from lazyimg.control import ControlClient
from lazyimg.demo.faults import FaultPlan, FaultRule
from lazyimg.demo.programs import wait_first_line
from lazyimg.errors import LazyImgError

# The disk that fails on request is the tests' own.
sys.path.append(str(Path(__file__).parent.parent / "tests"))
from faulty_disk import CHANGES, SYNCS, FaultyDisk

# What the command line of each has; this process sees its own namespace's alone.
ROLES = {"daemon": (b"lazyimg.daemon.service",), "holder": (b"lazyimg.daemon.holder", b"mount")}
STRIKES = ("processes", "Glance", "disk", "cache")
# The longest that something fails, but for Glance: away as long as this once in so many times.
OUTAGE_S_MAX = 6.0
LONG_OUTAGE_S = 30.0
LONG_OUTAGE_CHANCE = 0.25
# The longest that the daemon may be away until the next one answers.
REPLACED_S_MAX = 30.0
DAMAGED_PLACES = 20

GLANCE_FAULTS: dict[str, tuple[FaultRule, ...]] = {
    "slow": (FaultRule("delay", kind="any", seconds=0.4),),
    "lying: Content-Range": (FaultRule("wrong_content_range"),),
    "lying: 200 and all": (FaultRule("whole_body"),),
    "lying: 206 and all": (FaultRule("whole_body", status=206),),
    "lying: 204": (FaultRule("empty_204"),),
    "closing": (FaultRule("reset", kind="any"),),
    "closing in a body": (FaultRule("short_body", bytes=100_000),),
    "503, Retry-After": (FaultRule("status", kind="any", status=503, headers={"Retry-After": "1"}),),
    "429, Retry-After": (FaultRule("status", kind="any", status=429, headers={"Retry-After": "1"}),),
    "500": (FaultRule("status", kind="any", status=500),),
    "401 on data": (FaultRule("status", status=401),),
    "403 on data": (FaultRule("status", status=403),),
    "404 on data": (FaultRule("status", status=404),),
    "redirect": (FaultRule("redirect", location="http://127.0.0.1:1/elsewhere"),),
    "stalled before": (FaultRule("delay", seconds=60),),
    "stalled in a body": (FaultRule("stall", bytes=70_000, seconds=60),),
}
DISK_FAULTS: dict[str, dict[str, Any]] = {
    "EIO on chunks' reads": {"ops": ["read"], "path": "chunks/*", "error": errno.EIO},
    "EIO on chunks' writes": {"ops": ["write"], "path": "chunks/*", "error": errno.EIO},
    "EIO on syncs": {"ops": SYNCS, "error": errno.EIO},
    "EIO on the index": {"ops": ["read", "write", *SYNCS], "path": "index/*", "error": errno.EIO},
    "EIO on all": {"ops": [], "error": errno.EIO},
    "full": {"ops": ["write", "create", "mkdir"], "error": errno.ENOSPC},
    "read-only": {"ops": [*CHANGES, *SYNCS], "error": errno.EROFS},
    "slow": {"ops": ["read", "write", *SYNCS], "delay_s": 0.3},
    "hanging": {"ops": [], "hang": True},
    "hanging in chunks' reads": {"ops": ["read"], "path": "chunks/*", "hang": True},
    "hanging in syncs": {"ops": SYNCS, "hang": True},
}


class Torture:
    """The strikes of one run: begun with `start`, ended with `stop`; what was struck is in `struck`."""

    def __init__(
        self,
        seed: int,
        mounted: Mounted,
        glance: TorturedGlance,
        disk: FaultyDisk,
        images: list[TorturedImage],
    ) -> None:
        self.struck: Counter[str] = Counter()
        # When each strike began, or ended, in words.
        self.history: list[str] = []
        self.replaced_s_max = 0.0
        self._seed = seed
        self._mounted = mounted
        self._glance = glance
        self._disk = disk
        self._images = images
        self._control = ControlClient(mounted.control)
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def start(self, kinds: Collection[str] = STRIKES) -> None:
        """Begin to strike in these ways."""
        for kind in kinds:
            match kind:
                case "processes":
                    kills = {
                        self._kill: 4,
                        self._kill_burst: 1,
                        self._kill_holder: 2,
                        self._damage: 2,
                        self._damage_index: 1,
                    }
                    self._begin(kind, (1, 8), kills | {self._restart: 2, self._restart_and_kill: 1})
                case "Glance":
                    glance = {self._fail_glance: 8, self._end_glance: 1, self._freeze_glance: 1}
                    self._begin(kind, (0.5, 4), glance)
                case "disk":
                    self._begin(kind, (1, 6), {self._fail_disk: 1})
                case "cache":
                    self._begin(kind, (2, 8), {self._evict: 1})
                case _:
                    sys.exit(f"--strikes: {kind!r} is none of {', '.join(STRIKES)}")

    def stop(self) -> None:
        """Strike no more; returns when all is well.  Raises what a strike itself failed with."""
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _begin(
        self, kind: str, pause_s: tuple[float, float], strikes: dict[Callable[[random.Random], None], int]
    ) -> None:
        chance = random.Random(f"{self._seed} {kind}")

        def strike_on() -> None:
            try:
                while not self._ending.wait(chance.uniform(*pause_s)):
                    (strike,) = chance.choices(list(strikes), list(strikes.values()))
                    strike(chance)
            except BaseException as exc:
                # A strike that cannot be made is a fault of this program; without it the run proves nothing.
                self._errors.append(exc)

        thread = threading.Thread(target=strike_on, name=kind, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _count(self, name: str, times: int = 1) -> None:
        self.struck[name] += times
        self._note(name)

    def _note(self, words: str) -> None:
        self.history.append(f"{datetime.now():%H:%M:%S.%f} {words}")

    # ── processes ──

    def _kill(self, _chance: random.Random) -> None:
        self._count("daemon killed")
        _send("daemon", signal.SIGKILL)
        self._wait_replaced()

    def _kill_burst(self, chance: random.Random) -> None:
        """Kill the next one too, before or just after it is ready."""
        for _ in range(chance.randint(2, 4)):
            self._count("daemon killed, in a row")
            _send("daemon", signal.SIGKILL)
            time.sleep(chance.uniform(0.02, 1.2))
        self._wait_replaced()

    def _damage(self, chance: random.Random) -> None:
        """Change bytes of a chunk file under a daemon that is stopped, and kill it: the next must find them."""
        _send("daemon", signal.SIGSTOP)
        try:
            files = sorted((self._disk.lower / "chunks").iterdir())
            if files:
                self._count("chunks damaged", _damage(chance.choice(files), chance))
        finally:
            _send("daemon", signal.SIGKILL)
        self._wait_replaced()

    def _damage_index(self, chance: random.Random) -> None:
        """The same with the index: cut short, or garbage where it begins."""
        _send("daemon", signal.SIGSTOP)
        try:
            path = self._disk.lower / "index" / "cache.db"
            if path.exists():
                self._count("index damaged")
                if chance.random() < 0.5:
                    os.truncate(path, chance.randrange(path.stat().st_size))
                else:
                    with path.open("r+b") as file:
                        file.write(chance.randbytes(8192))
        finally:
            _send("daemon", signal.SIGKILL)
        self._wait_replaced()

    def _kill_holder(self, chance: random.Random) -> None:
        """Kill the holder, and maybe the daemon as soon as it has started another, or later."""
        self._count("holder killed")
        holder = _send("holder", signal.SIGKILL)
        if chance.random() < 0.3:
            # Both at once are the end of a mount without systemd.
            machine.wait_until(lambda: processes_of("holder") not in ([], [holder]), "another holder")
            time.sleep(chance.uniform(0, 1))
            self._count("daemon killed, after the holder")
            _send("daemon", signal.SIGKILL)
        self._wait_replaced(lambda status: status["holder_pid"] != holder)

    def _restart(self, _chance: random.Random) -> None:
        """A planned hand-over; what does not become ready in time is given up, and the old daemon goes on."""
        try:
            self._control.restart()
            self._count("daemon replaced by `restart`")
        except LazyImgError:
            self._count("`restart` refused or cut short")
        self._wait_replaced()

    def _restart_and_kill(self, chance: random.Random) -> None:
        restarting = threading.Thread(target=self._restart, args=(chance,))
        restarting.start()
        time.sleep(chance.uniform(0, 1.5))
        self._count("daemon killed while it was replaced")
        _send("daemon", signal.SIGKILL)
        restarting.join()
        self._wait_replaced()

    def _wait_replaced(self, is_replaced: Callable[[dict[str, Any]], bool] = bool) -> None:
        began_s = time.monotonic()
        while True:
            with contextlib.suppress(LazyImgError):
                if is_replaced(self._control.status()):
                    self.replaced_s_max = max(self.replaced_s_max, time.monotonic() - began_s)
                    return
            if time.monotonic() > began_s + REPLACED_S_MAX:
                raise RuntimeError(f"no daemon answers {REPLACED_S_MAX:.0f} s after one was struck")
            time.sleep(0.02)

    # ── Glance ──

    def _fail_glance(self, chance: random.Random) -> None:
        name = chance.choice(sorted(GLANCE_FAULTS))
        self._count(f"Glance {name}")
        self._glance.fail(*GLANCE_FAULTS[name])
        self._ending.wait(_outage_s(chance))
        self._glance.fail()
        self._note("Glance is well again")

    def _end_glance(self, chance: random.Random) -> None:
        self._count("Glance ended")
        self._glance.stop()
        self._ending.wait(LONG_OUTAGE_S if chance.random() < LONG_OUTAGE_CHANCE else _outage_s(chance))
        self._glance.start()
        self._note("Glance is well again")

    def _freeze_glance(self, chance: random.Random) -> None:
        """Its connections stay, new ones are accepted by the kernel, and nothing is answered."""
        self._count("Glance frozen")
        with self._glance.frozen():
            self._ending.wait(_outage_s(chance))

    # ── the cache and its disk ──

    def _fail_disk(self, chance: random.Random) -> None:
        name = chance.choice(sorted(DISK_FAULTS))
        self._count(f"disk {name}")
        fault = dict(DISK_FAULTS[name])
        self._disk.strike(*fault.pop("ops"), **fault)
        self._ending.wait(_outage_s(chance))
        self._disk.heal()
        self._note("disk is well again")

    def _evict(self, chance: random.Random) -> None:
        image = chance.choice(self._images)
        with Gate(self._mounted.folder / image.name).closed():
            try:
                self._control.evict(image.record.id)
                self._count("image evicted")
            except LazyImgError:
                # The daemon may not know yet that nobody has it open, Glance may be away, or no daemon be there.
                self._count("image not evicted: refused")


class TorturedGlance:
    """An embedded Glance in a process of its own, that can be ended, frozen and made to fail."""

    def __init__(self, folder: Path, log: IO[bytes]) -> None:
        self._folder = folder
        self._log = log
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TorturedGlance:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it answers; the same after each start."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "lazyimg.demo.glance", "--data", self._folder, "--port", self._port]
        self._process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=self._log, stdin=subprocess.DEVNULL
        )
        url = wait_first_line(self._process, "the embedded Glance", timeout_s=30)
        self._port = int(url.rpartition(":")[2])

    def stop(self) -> None:
        """Kill it."""
        assert self._process is not None
        with self._process as process:
            process.kill()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Keep it from running in the block."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def fail(self, *rules: FaultRule) -> None:
        """Set its faults; none: all is well."""
        body = json.dumps(FaultPlan(*rules).to_json()).encode()
        request = urllib.request.Request(f"{self.url}/faults", body, method="PUT")
        urllib.request.urlopen(request, timeout=30).close()


def _outage_s(chance: random.Random) -> float:
    """Return how long something is to be away: mostly a second or two."""
    return min(chance.expovariate(1 / 1.5) + 0.2, OUTAGE_S_MAX)


def processes_of(role: str) -> list[int]:
    """Return the living "daemon" or "holder" processes; there are two while one is replaced."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if any(one in words for one in ROLES[role]) and b"umount" not in words:
                found.append(int(process.name))
    return sorted(found)


def _send(role: str, number: int) -> int:
    """Send a signal to the newest process of a role, and return its id."""
    # Between two of them there is none; the next is at hand in a moment.
    for _ in range(2000):
        with contextlib.suppress(ProcessLookupError):
            if found := processes_of(role):
                os.kill(found[-1], number)
                return found[-1]
        time.sleep(0.005)
    raise RuntimeError(f"there has been no {role} for 10 s")


def _damage(path: Path, chance: random.Random) -> int:
    """Change a byte in each of some places that have data; return in how many."""
    size_bytes = path.stat().st_size
    damaged = 0
    with path.open("r+b", buffering=0) as file:
        for _ in range(DAMAGED_PLACES):
            at = chance.randrange(size_bytes)
            start = at // CLUSTER_BYTES * CLUSTER_BYTES
            with contextlib.suppress(OSError):
                # OSError: no data from there to the end.
                if os.lseek(file.fileno(), start, os.SEEK_DATA) >= start + CLUSTER_BYTES:
                    continue
                byte = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << chance.randrange(8)]), at)
                damaged += 1
    return damaged
