"""What do reads of a wholly present image cost, against a C daemon that does nothing else?

fio reads the same bytes through lazyimg's mount, through a plain C libfuse loop over pread, and from the
local file, in alternating rounds; all bytes are in the page cache of the daemons' own files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import glance_nginx
import lazyimg_process
import machine
from glance_nginx import ServedImage, served_image

HERE = Path(__file__).parent
READ_AHEAD_KIB = 1024
# CPUs of fio and of the daemons.  Where the scheduler puts them decides a 4 KiB read more than what they do:
# on a 2-CPU virtual machine the C loop did 13k to 72k IOPS when free, 9k to 15k apart, where each read waits
# for an idle CPU to wake, and 62k to 87k on one CPU (2026-11-23).  So both are measured, both have to be good.
PLACEMENTS = {"free": None, "apart": (0, 1), "same": (0, 0)}
LOCAL = "local file"
C_LOOP = "C libfuse loop"
LAZYIMG = "lazyimg"
IMAGE_ID = "0fa57ead-0000-4000-8000-0fa57ead0fa5"


# Measured values by pattern and reader.
Values = dict[tuple[str, str], list[float]]


@dataclass(frozen=True)
class Pattern:
    """One way of reading; `target_ratio` is what lazyimg must reach of the C loop, None without a target."""

    name: str
    fio: tuple[str, ...]
    unit: str
    target_ratio: float | None


@dataclass(frozen=True)
class Reader:
    """A file to read and the process that answers for it, None for the kernel alone."""

    name: str
    path: Path
    daemon_id: int | None


PATTERNS = (
    Pattern(
        "4 KiB random, O_DIRECT, depth 1",
        ("--rw=randread", "--bs=4k", "--direct=1", "--ioengine=psync", "--time_based=1"),
        "IOPS",
        0.8,
    ),
    Pattern(
        "4 KiB random, O_DIRECT, depth 16",
        ("--rw=randread", "--bs=4k", "--direct=1", "--ioengine=libaio", "--iodepth=16", "--time_based=1"),
        "IOPS",
        None,
    ),
    Pattern(
        "1 MiB sequential, O_DIRECT",
        ("--rw=read", "--bs=1m", "--direct=1", "--ioengine=psync", "--time_based=1"),
        "MB/s",
        0.75,
    ),
    # Once through the file and no more: the second time it would be the kernel's page cache that answers.
    Pattern(
        "1 MiB sequential, buffered", ("--rw=read", "--bs=1m", "--direct=0", "--ioengine=psync"), "MB/s", 0.75
    ),
)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2, help="how long each measurement takes")
    parser.add_argument("--size-mib", type=int, default=2048, help="size of the image")
    parser.add_argument(
        "--placements",
        default="same,apart",
        help="fio and the daemons on the same CPU, apart on one each, or free; a list",
    )
    parser.add_argument("--no-lazyimg", action="store_true", help="the references alone")
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where image and cache lie")
    options = parser.parse_args()
    options.placements = options.placements.split(",")
    if unknown := [name for name in options.placements if name not in PLACEMENTS]:
        parser.error(f"no placement {unknown[0]!r}; there are {', '.join(PLACEMENTS)}")
    return machine.run_isolated(lambda work_dir: measure(options, work_dir), options.work_dir)


def measure(options: argparse.Namespace, work_dir: Path) -> int:
    """Run all rounds and print the table; 1 if a target is missed."""
    machine.print_machine(["fio", "--version"], ["pkg-config", "--modversion", "fuse3"], ["nginx", "-v"])
    image = make_image(work_dir / "image.raw", options.size_mib)
    has_missed = False
    with ExitStack() as stack:
        readers = [Reader(LOCAL, work_dir / "image.raw", None), stack.enter_context(c_loop(image, work_dir))]
        if not options.no_lazyimg:
            readers.append(stack.enter_context(lazyimg_present(image, work_dir)))
        os.sync()
        for reader in readers:
            # Fills the page cache beneath the daemons, and lets lazyimg verify each chunk once.
            machine.run("cp", reader.path, "/dev/null")
            drop_fuse_pages(reader)
        for placement in options.placements:
            place(placement, readers)
            values = run_rounds(readers, options.rounds, options.seconds)
            print(f"\nfio and daemons: {placement}")
            has_missed |= print_results(values, [reader.name for reader in readers])
    return int(has_missed)


def run_rounds(readers: list[Reader], rounds: int, seconds: float) -> Values:
    """Measure all readers in turn, another one first in each round."""
    values: Values = {}
    for round_number in range(rounds):
        turn = round_number % len(readers)
        for pattern in PATTERNS:
            for reader in readers[turn:] + readers[:turn]:
                value = run_fio(pattern, reader, seconds)
                values.setdefault((pattern.name, reader.name), []).append(value)
    return values


def place(placement: str, readers: list[Reader]) -> None:
    """Bind this process, and so each fio, and the daemons' threads to their CPUs."""
    every_cpu = range(os.cpu_count() or 1)
    cpus = PLACEMENTS[placement]
    os.sched_setaffinity(0, every_cpu if cpus is None else {cpus[0]})
    for reader in readers:
        # A daemon that ended meanwhile is reported where its mount ends.
        if reader.daemon_id is not None and Path(f"/proc/{reader.daemon_id}").exists():
            for thread in Path(f"/proc/{reader.daemon_id}/task").iterdir():
                os.sched_setaffinity(int(thread.name), every_cpu if cpus is None else {cpus[1]})


def drop_fuse_pages(reader: Reader) -> None:
    """Forget the kernel's pages of a FUSE file; those of the local file are what the daemons read from.

    At once and not before the next measurement only: pages that lie about free may have gone back to the
    host by then, and the reader that gets them pays for it.
    """
    if reader.daemon_id is None:
        return
    fd = os.open(reader.path, os.O_RDONLY | os.O_CLOEXEC)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def make_image(path: Path, size_mib: int) -> ServedImage:
    """Write an image of pseudo-random bytes; no hash, so that it never leaves FUSE by graduating."""
    chance = random.Random(size_mib)
    with path.open("wb") as file:
        for _ in range(size_mib):
            file.write(chance.randbytes(1 << 20))
    return served_image(path, IMAGE_ID, "present")


@contextmanager
def c_loop(image: ServedImage, work_dir: Path) -> Iterator[Reader]:
    """Serve the image's file by the C reference inside the block."""
    assert image.path is not None
    program = machine.compile_c(HERE / "c" / "fuse_pread.c", work_dir / "fuse_pread", "fuse3")
    mountpoint = work_dir / "c_loop"
    mountpoint.mkdir()
    with machine.background_process([program, image.path, mountpoint], work_dir / "c_loop.log") as process:
        machine.wait_until(mountpoint.is_mount, "the C loop's mount")
        set_read_ahead(mountpoint)
        yield Reader(C_LOOP, mountpoint / "image", process.pid)


def set_read_ahead(mountpoint: Path) -> None:
    """Give the mount the read-ahead that lazyimg gives its own: the comparison is not of that setting."""
    device = mountpoint.stat().st_dev
    bdi = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}")
    (bdi / "read_ahead_kb").write_text(str(READ_AHEAD_KIB))


@contextmanager
def lazyimg_present(image: ServedImage, work_dir: Path) -> Iterator[Reader]:
    """Mount lazyimg with the image wholly in its cache inside the block."""
    with (
        glance_nginx.serve_images([image], work_dir / "server", is_shaped=False) as server,
        lazyimg_process.mount(server.endpoint, work_dir / "lazyimg") as mounted,
    ):
        mounted.prefetch(image.record)
        _, requests_before = server.sent()
        yield Reader(LAZYIMG, mounted.image_path(image.record), mounted.status()["daemon_pid"])
        if server.sent()[1] != requests_before:
            sys.exit("lazyimg asked Glance for present bytes: these were not cached reads")


def run_fio(pattern: Pattern, reader: Reader, seconds: float) -> float:
    """Run one measurement and return IOPS or MB/s."""
    command = ("fio", "--name=read", f"--filename={reader.path}", "--readonly", "--output-format=json")
    options = (f"--runtime={seconds}", "--invalidate=0", "--thread")
    report = json.loads(machine.run(*command, *pattern.fio, *options))
    drop_fuse_pages(reader)
    read = report["jobs"][0]["read"]
    return float(read["iops"] if pattern.unit == "IOPS" else read["bw_bytes"] / 1e6)


def print_results(values: Values, names: list[str]) -> bool:
    """Print medians and the ratio to the C loop; True if a target is missed."""
    print(f"{'pattern':34} {'reader':16} {'median':>9} {'lowest':>9} {'highest':>9}       of C loop")
    has_missed = False
    for pattern in PATTERNS:
        reference = machine.median(values[pattern.name, C_LOOP])
        for name in names:
            measured = values[pattern.name, name]
            ratio = machine.median(measured) / reference
            spread = f"{machine.median(measured):9.0f} {min(measured):9.0f} {max(measured):9.0f}"
            print(f"{pattern.name:34} {name:16} {spread} {pattern.unit:5} {ratio:9.2f}", end="")
            if name == LAZYIMG and pattern.target_ratio is not None:
                is_reached = ratio >= pattern.target_ratio
                has_missed |= not is_reached
                print(f"  target ≥ {pattern.target_ratio}: {'reached' if is_reached else 'MISSED'}", end="")
            print()
    return has_missed


if __name__ == "__main__":
    sys.exit(main())
