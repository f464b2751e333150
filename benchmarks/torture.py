"""Does anything that dies, lies, fails or stalls make a guest read a wrong byte, or fail a read that could have waited?

Readers compare each byte of three images (raw; qcow2, decoded, with compressed clusters; raw in a store without
ranges), writers hold upper files to a model, and meanwhile processes, Glance and cache are struck at random.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lazyimg_process
import machine
from lazyimg_process import LAZYIMG, Mounted
from torture_images import MIB, TorturedImage, make_images
from torture_strikes import STRIKES, FaultyDisk, Torture, TorturedGlance, processes_of
from torture_takes import Takes, print_takes, takes
from torture_tally import Count, Tally

from lazyimg.control import ControlClient
from lazyimg.demo.glance import EmbeddedGlance
from lazyimg.errors import LazyImgError

HERE = Path(__file__).parent
# Whoever has waited longer waits for ever: no outage is longer than 6 s, and between two there is time to fetch.
HUNG_S = 90.0
# How long all of them may take to end after their last operation.
END_S = 120.0
SETTINGS = {
    # Far above the longest outage: no read may fail.
    "READ_TIMEOUT": "300",
    # Short, so that what stalls is given up and tried again within an outage.
    "FIRST_BYTE_TIMEOUT": "3",
    "BETWEEN_BYTES_TIMEOUT": "2",
    "CONNECT_TIMEOUT": "2",
    # Less than the images: some of them are dropped on and on.
    "CACHE_SIZE_MAX": str(160 * MIB),
}
# Readers by kind and image; qemu-io is a guest that has its disk open for long.
READERS = (
    ("direct", "raw"),
    ("direct", "qcow2"),
    ("direct", "qcow2"),
    ("direct", "stream"),
    ("compare", "qcow2"),
    ("compare", "stream"),
    ("qemu-io", "raw"),
)
WRITERS = (("root", "."), ("sub", "folder"))
HISTORY_MAX = 100


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, help="of an earlier run, to strike as it did; random by default")
    parser.add_argument("--strikes", default=",".join(STRIKES), help="which kinds, of %(default)s")
    parser.add_argument("--log", type=Path, help="where to keep a copy of what lazyimg logged")
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where images and caches lie")
    options = parser.parse_args()
    if options.seed is None:
        # Where the inner run sees it: it is the same script with the same words.
        options.seed = secrets.randbelow(1 << 32)
        sys.argv += ["--seed", str(options.seed)]
    return machine.run_isolated(lambda work_dir: torture(options, work_dir), options.work_dir)


def torture(options: argparse.Namespace, work_dir: Path) -> int:
    """Run it all and print the tables; 1 if anything is not as promised."""
    os.environ.update({f"LAZYIMG_{key}": value for key, value in SETTINGS.items()})
    machine.print_machine(["qemu-img", "--version"])
    print(f"seed: {options.seed}", flush=True)
    glance_data = work_dir / "glance"
    images = make_images(work_dir / "images", EmbeddedGlance(glance_data), random.Random(options.seed))
    folder = work_dir / "lazyimg"
    (folder / "_base" / "folder").mkdir(parents=True)
    disk = FaultyDisk(work_dir / "disk")
    with (
        _aborted(work_dir),
        _ended(disk),
        _kept(folder / "lazyimg.log", options.log),
        (work_dir / "glance.log").open("ab") as glance_log,
        TorturedGlance(glance_data, glance_log) as glance,
        lazyimg_process.mount(glance.url, folder, cache_dir=disk.path, may_be_replaced=True) as mounted,
    ):
        first_look(mounted, images)
        begin = takes()
        strikes = Torture(options.seed, mounted, glance, disk, images)
        with Workers(options.seed, mounted, images) as workers:
            strikes.start(options.strikes.split(","))
            peak = watch(workers, mounted, time.monotonic() + options.minutes * 60)
            strikes.stop()
            workers.end()
        problems = workers.problems + last_look(mounted, images)
        end = takes()
        machine.run(LAZYIMG, "umount", mounted.mountpoint)
    problems += upper_problems(mounted, workers)
    problems += [f"a traceback in the daemon's log: {line}" for line in tracebacks(mounted.log)]
    print_strikes(strikes)
    problems += print_work(workers) + print_takes(begin, peak, end)
    for problem in problems:
        print(f"MISSED: {problem}")
    if problems:
        print("\n".join(["what was struck last:", *strikes.history[-HISTORY_MAX:]]))
        print(f"the end of the log:\n{mounted.log[-5000:]}")
    print(f"seed {options.seed}: {'MISSED' if problems else 'all reached'}")
    return int(bool(problems))


@contextlib.contextmanager
def _aborted(work_dir: Path) -> Iterator[None]:
    """Have the kernel give up at the end what hangs in a mount, or its processes could not even be killed."""
    try:
        yield
    finally:
        control = work_dir / "fusectl"
        control.mkdir()
        machine.run("mount", "-t", "fusectl", "none", control)
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            words = line.split()
            if words[4].startswith(f"{work_dir}/") and " - fuse" in line:
                with contextlib.suppress(OSError):
                    (control / words[2].partition(":")[2] / "abort").write_text("1")
        machine.run("umount", control)


@contextlib.contextmanager
def _ended(disk: FaultyDisk) -> Iterator[None]:
    try:
        yield
    finally:
        disk.end()


@contextlib.contextmanager
def _kept(log: Path, copy: Path | None) -> Iterator[None]:
    try:
        yield
    finally:
        if copy is not None:
            copy.write_bytes(log.read_bytes())


class Workers:
    """All readers and writers, in the block."""

    def __init__(self, seed: int, mounted: Mounted, images: list[TorturedImage]) -> None:
        self.problems: list[str] = []
        self.tallies: list[Tally] = []
        self.reports: dict[str, Path] = {}
        self._mounted = mounted
        self._folder = mounted.folder
        self._processes: list[subprocess.Popen[bytes]] = []
        by_name = {image.name: image for image in images}
        for number, (kind, name) in enumerate(READERS):
            image = by_name[name]
            self._start(
                "torture_readers.py",
                f"{kind}-{name}-{number}",
                f"{seed} {number}",
                *(kind, "--image", mounted.image_path(image.record), "--expected", image.expected),
                *("--gate", self._folder / name, "--scratch", self._folder / f"{number}.qcow2"),
            )
        for name, place in WRITERS:
            self.reports[name] = self._folder / f"{name}.json"
            self._start(
                "torture_writers.py",
                name,
                f"{seed} {name}",
                *("--folder", mounted.mountpoint / place, "--report", self.reports[name]),
            )

    def _start(self, script: str, name: str, seed: str, *words: str | Path) -> None:
        tally = Tally(self._folder / f"{name}.tally", name)
        self.tallies.append(tally)
        command = [
            sys.executable,
            HERE / script,
            *words,
            "--name",
            name,
            "--seed",
            seed,
            "--tally",
            tally.path,
        ]
        self._processes.append(subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_exc: object) -> None:
        for process in self._processes:
            process.kill()

    def total(self, count: Count) -> int:
        """Return a number of all of them together."""
        return sum(tally[count] for tally in self.tallies)

    def look_for_hung(self) -> None:
        """Ends the run, with all there is to know of it, if one waits too long; a problem if one has ended."""
        for tally, process in zip(self.tallies, self._processes, strict=True):
            if tally.waited_s() > HUNG_S:
                print_state(self._mounted)
                sys.exit(f"{tally.name} has waited for {tally.waited_s():.0f} s")
            if process.poll() is not None:
                print_state(self._mounted)
                sys.exit(f"{tally.name} ended with {process.returncode}")

    def end(self) -> None:
        """Let each end after its operation."""
        for tally in self.tallies:
            tally.end()
        ends_s = time.monotonic() + END_S
        for tally, process in zip(self.tallies, self._processes, strict=True):
            try:
                if code := process.wait(max(0.1, ends_s - time.monotonic())):
                    self.problems.append(f"{tally.name} ended with {code}")
            except subprocess.TimeoutExpired:
                print_state(self._mounted)
                self.problems.append(f"{tally.name} did not end within {END_S:.0f} s")


# ── before, meanwhile, after ──


def first_look(mounted: Mounted, images: list[TorturedImage]) -> None:
    """Read a little of each image, so that what a daemon in use takes is there from the beginning."""
    for image in images:
        with mounted.image_path(image.record).open("rb", buffering=0) as file:
            file.read(4096)


def watch(workers: Workers, mounted: Mounted, ends_s: float) -> dict[str, Takes]:
    """Look for what hangs, until the time is over; return the most that the processes took meanwhile."""
    peak: dict[str, Takes] = {}
    while time.monotonic() < ends_s:
        time.sleep(1)
        workers.look_for_hung()
        with contextlib.suppress(OSError):
            # OSError: killed while it was looked at.
            for name, one in takes().items():
                peak[name] = one.most(peak.get(name, one))
    return peak


def last_look(mounted: Mounted, images: list[TorturedImage]) -> list[str]:
    """Read each image whole once more, and let lazyimg verify what it has; return what is not as it must be."""
    problems = []
    for image in images:
        path = mounted.image_path(image.record)
        command = [
            "qemu-img",
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            "-T",
            "none",
            str(path),
            str(image.expected),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HUNG_S)
        if done.returncode != 0:
            problems.append(f"{image.name}, all of it at the end: {(done.stdout + done.stderr).strip()}")
        verify = [LAZYIMG, "verify", image.record.id, "--control", mounted.control]
        done = subprocess.run(
            list(map(str, verify)), capture_output=True, text=True, check=False, timeout=HUNG_S
        )
        if done.returncode != 0:
            problems.append(f"{image.name}: {done.stderr.strip().splitlines()[-1]}")
    return problems


def upper_problems(mounted: Mounted, workers: Workers) -> list[str]:
    """Compare the folder beneath the mount with what its writers were told is done."""
    problems = []
    for (name, place), report in zip(WRITERS, workers.reports.values(), strict=True):
        if not report.exists():
            continue
        found = {
            path.name.removeprefix(f"{name}-"): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (mounted.mountpoint / place).glob(f"{name}-*")
        }
        wanted = json.loads(report.read_text())
        problems += [
            f"upper file {name}-{one}: not as it was written"
            for one in sorted(found.keys() | wanted.keys())
            if found.get(one) != wanted.get(one)
        ]
    return problems


def tracebacks(log: str) -> Iterator[str]:
    """Yield the last line of each traceback: an error nobody foresaw."""
    lines = iter(log.splitlines())
    for line in lines:
        if line.startswith("Traceback"):
            yield next((one for one in lines if one[:1] not in ("", " ", "|")), line)


# ── what is printed ──


def print_strikes(strikes: Torture) -> None:
    """Print how often each thing was struck."""
    print(f"\n{'struck':32} {'times':>6}")
    for name, times in sorted(strikes.struck.items()):
        print(f"{name:32} {times:6}")
    print(f"longest until a daemon answered after a kill: {strikes.replaced_s_max:.2f} s")


def print_work(workers: Workers) -> list[str]:
    """Print what was done; return what should not have been."""
    print(f"\n{'who':18} {'reads':>8} {'MB compared':>12} {'changes':>8} {'longest, s':>10} {'not now':>8}")
    for one in workers.tallies:
        work = f"{one[Count.READS]:8} {one[Count.BYTES] / 1e6:12.1f} {one[Count.CHANGES]:8}"
        print(f"{one.name:18} {work} {one[Count.LONGEST_NS] / 1e9:10.2f} {one[Count.NOT_NOW]:8}")
    print(f"\nreads made: {workers.total(Count.READS)}")
    print(f"bytes verified: {workers.total(Count.BYTES)}")
    print(f"upper operations: {workers.total(Count.CHANGES)}")
    print(f"changes of a name done and reported failed: {workers.total(Count.DOUBTED)}")
    wrong, failed = workers.total(Count.WRONG), workers.total(Count.FAILED)
    print(f"wrong bytes: {wrong} reads (target 0)")
    print(f"failed reads and changes: {failed} (target 0: all could have waited)")
    problems = [f"{tally.name} has done nothing" for tally in workers.tallies if not _worked(tally)]
    return problems + [f"{count} {what}" for count, what in ((wrong, "wrong"), (failed, "failed")) if count]


def _worked(tally: Tally) -> bool:
    return bool(tally[Count.READS] or tally[Count.CHANGES])


def print_state(mounted: Mounted) -> None:
    """Print what can be known of a mount that hangs, without touching it."""
    with contextlib.suppress(LazyImgError):
        print(json.dumps(ControlClient(mounted.control).status(), indent=1))
    for process_id in processes_of("daemon") + processes_of("holder"):
        with contextlib.suppress(OSError):
            # The daemon writes what each of its tasks waits for into its log.
            os.kill(process_id, signal.SIGUSR1)
        for task in sorted(Path(f"/proc/{process_id}/task").iterdir()):
            with contextlib.suppress(OSError):
                where = (task / "wchan").read_text() + "\n" + (task / "stack").read_text()
                print(
                    f"process {process_id}, thread {task.name} {(task / 'comm').read_text().strip()}: {where}"
                )
    time.sleep(1)
    print(f"the end of the log:\n{mounted.log[-20000:]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
