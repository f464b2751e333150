"""The programs the demo starts: each with a deadline, none left behind.

Every program gets a process group of its own, so that a Ctrl-C reaches only the demo and the demo decides the
order of the end.  A program is ended by the id of its group, and dies with us even if we are killed.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lazyimg.errors import LazyImgError

# Debian keeps administrators' programs out of a user's PATH; mkfs.ext4 is one and needs no root here.
_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
_DEBIAN_PACKAGES = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "fusermount3": "fuse3",
    "mkfs.ext4": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
}


def require_programs(*names: str) -> None:
    """Raise LazyImgError, naming program and Debian package, for the first one that is not installed."""
    for name in names:
        _path_of(name)


def run_program(
    argv: Sequence[str | Path],
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Run to the end and return what was printed on standard output.

    Raises LazyImgError when the program is missing, fails (with its last line of standard error) or takes
    longer than `timeout_s`; it is then dead, and so is what it started.
    """
    name = _shown(argv)
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as exc:
            raise LazyImgError(f"{name}: not finished after {timeout_s:.0f} s") from exc
    if process.returncode:
        lines = stderr.decode(errors="replace").strip().splitlines()
        # A program of our own says all in its last line; apt and mkfs say it in the first error.
        said = next((line for line in lines if line.startswith("E:")), lines[-1] if lines else "no message")
        raise LazyImgError(f"{name}: exit code {process.returncode}: {said}")
    return stdout.decode(errors="replace")


@contextmanager
def started(
    argv: Sequence[str | Path],
    *,
    stdout: int,
    stderr: int,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stop_timeout_s: float = 0,
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program for the length of the block; at its end it is dead, and so is its process group.

    Still running then, it is asked to end with SIGTERM and `stop_timeout_s` to do so (0: not asked), then
    killed.  `env` is added to the environment.
    """
    program = _path_of(str(argv[0]))
    process = subprocess.Popen(
        [_path_of("setpriv"), "--pdeathsig", "TERM", "--", program, *map(str, argv[1:])],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        process_group=0,
    )
    try:
        yield process
    finally:
        _end(process, stop_timeout_s)


def wait_first_line(process: subprocess.Popen[bytes], what: str, *, timeout_s: float) -> str:
    """Return the first line a program prints into its pipe; raise LazyImgError if none comes."""
    assert process.stdout is not None
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))
        # One byte at a time: the line is short, and nothing after it may be taken from the pipe.
        byte = os.read(process.stdout.fileno(), 1) if ready else b""
        if not byte:
            raise LazyImgError(f"{what}: no first line {'before it ended' if ready else 'in time'}")
        line += byte
    return line.decode(errors="replace").strip()


def wait_until_ended(process: subprocess.Popen[bytes], what: str, *, timeout_s: float) -> None:
    """Wait for a program that should end by itself; raise LazyImgError if it does not, or fails."""
    try:
        code = process.wait(timeout_s)
    except subprocess.TimeoutExpired as exc:
        raise LazyImgError(f"{what}: still running after {timeout_s:.0f} s") from exc
    if code:
        raise LazyImgError(f"{what}: ended with exit code {code}")


def _end(process: subprocess.Popen[bytes], stop_timeout_s: float) -> None:
    try:
        if process.poll() is None and stop_timeout_s:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(stop_timeout_s)
    finally:
        # The leader may have gone and left members; usually the group is empty and has no id any more.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def _path_of(name: str) -> str:
    path = shutil.which(name, path=_SEARCH_PATH)
    if path is None:
        package = _DEBIAN_PACKAGES.get(name, name)
        raise LazyImgError(f"{name} is not installed (Debian package {package}); run `make setup`")
    return path


def _shown(argv: Sequence[str | Path]) -> str:
    """Return the program and its subcommand if it has one, as an error message names a command."""
    return " ".join([Path(argv[0]).name, *(str(word) for word in argv[1:2] if str(word)[0] not in "-/")])
