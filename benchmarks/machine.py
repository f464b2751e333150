"""What every benchmark says first (machine, versions, command) and where it runs.

A benchmark runs in network, mount and process namespaces of its own: whatever happens to it, no process,
mount or interface of it outlives it, and its traffic cannot leave the machine.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import FrameType

# Set for the inner run; not a LAZYIMG_ name, the daemon refuses those it does not know.
WORK_DIR_VARIABLE = "BENCH_WORK_DIR"
NAMESPACES = ("--net", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--mount-proc")
STOP_TIMEOUT_S = 15


def run_isolated(benchmark: Callable[[Path], int], parent_dir: Path) -> int:
    """Run this script again in namespaces of its own and call `benchmark` there with an empty work folder.

    Returns its exit code.  The folder lies in `parent_dir` and is removed at the end.
    """
    inside = os.environ.pop(WORK_DIR_VARIABLE, None)
    if inside is not None:
        signal.signal(signal.SIGTERM, _exit_on_signal)
        _detach_copies()
        run("ip", "link", "set", "lo", "up")
        return benchmark(Path(inside))
    if os.geteuid() != 0:
        sys.exit(f"{sys.argv[0]}: needs root for namespaces and /dev/fuse; run it as root")
    signal.signal(signal.SIGTERM, _exit_on_signal)
    with tempfile.TemporaryDirectory(prefix="lazyimg-bench-", dir=parent_dir) as work_dir:
        # setpriv: the inner run ends with this process even when nobody could tell it to.  -u: a number shows
        # when it was measured, also where the output goes into a file.
        inner = [sys.executable, "-u", *sys.argv]
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, *inner]
        process = subprocess.Popen(command, env={**os.environ, WORK_DIR_VARIABLE: work_dir})
        try:
            return process.wait()
        finally:
            # Ends all of the inner run at once, by --kill-child; nothing to do when it ended by itself.
            process.kill()
            process.wait()


def _detach_copies() -> None:
    """Detach what this namespace copied of others' FUSE mounts: unmounted there, they would live on here."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split(" ")
        if kind.startswith("fuse"):
            # It may go by itself.  Octal escapes as of fstab(5).
            path = place.encode().decode("unicode_escape")
            subprocess.run(["umount", "--lazy", path], capture_output=True, check=False)


def _exit_on_signal(signum: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signum)


def print_machine(*tools: Sequence[str]) -> None:
    """Print machine, versions and command; each tool is a command line that prints its version."""
    print(f"command: {shlex.join([Path(sys.executable).name, *sys.argv])}")
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cpus = f"{os.cpu_count()} CPUs {_cpu_model()}"
    print(f"machine: {cpus}, {memory_gib:.0f} GiB, Linux {platform.release()}")
    packages = ("lazyimg", "pyfuse3", "trio", "httpx")
    versions = [
        f"Python {platform.python_version()}",
        *(f"{name} {metadata.version(name)}" for name in packages),
    ]
    versions += [_first_line(tool) for tool in tools if shutil.which(tool[0])]
    print(f"versions: {', '.join(versions)}")
    settings = [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("LAZYIMG_")
    ]
    if settings:
        print(f"settings: {' '.join(settings)}")


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr).partition("\n")[0].strip()


def run(*command: str | Path, timeout_s: float = 120) -> str:
    """Run a command to its end and return its output; ends the benchmark with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode != 0:
        sys.exit(f"{shlex.join(map(str, command))}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def compile_c(source: Path, target: Path, package: str) -> Path:
    """Compile one C file against a pkg-config package and return the program."""
    flags = run("pkg-config", "--cflags", "--libs", package).split()
    run("gcc", "-O2", "-Wall", "-Wextra", "-o", target, source, *flags)
    return target


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Return when `condition` holds; ends the benchmark, naming `what`, if that takes too long."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            sys.exit(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.02)


@contextlib.contextmanager
def background_process(command: Sequence[str | Path], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a program running inside the block, its output in `log`; SIGTERM at the end, then SIGKILL."""
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(
                f"{Path(command[0]).name} did not end on SIGTERM within {STOP_TIMEOUT_S} s; killed",
                flush=True,
            )
            process.kill()
            process.wait()


def drop_page_cache() -> None:
    """Write back what is dirty and forget clean pages, so that one round does not pay for the last."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def median(values: Sequence[float]) -> float:
    """Return the median; with the few rounds of a benchmark it forgets one bad round."""
    return statistics.median(values)
