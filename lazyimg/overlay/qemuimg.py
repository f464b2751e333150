"""qemu-img, under limits and never guessing a format.

A hostile image must not make it take the machine: address space and CPU time are limited as Nova limits them
(nova.privsep.qemu.QEMU_IMG_LIMITS), by util-linux's prlimit, which sets them before qemu-img begins.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from lazyimg.errors import LazyImgError

ADDRESS_SPACE_BYTES_MAX = 1 << 30
CPU_TIME_S_MAX = 30
# It may read through the mount, where one read waits up to read_timeout, 300 s unless configured.
TIME_LIMIT_S = 330.0
# What the command line makes exceptions of.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Of its standard error in a message.
REASON_CHARACTERS_MAX = 500


def create_qcow2(
    path: Path, *, backing: Path, backing_format: str, size_bytes: int, cluster_size_bytes: int | None
) -> None:
    """Make a qcow2 file of `size_bytes` on `backing`, opened as `backing_format` and nothing else."""
    options = f"backing_file={_escaped(backing)},backing_fmt={backing_format}"
    if cluster_size_bytes is not None:
        options += f",cluster_size={cluster_size_bytes}"
    _run("create", "-q", "-f", "qcow2", "-o", options, str(path), str(size_bytes))


def qcow2_facts(path: Path) -> dict[str, Any]:
    """Return what `qemu-img info` says of a file opened as qcow2: virtual-size, cluster-size and so on."""
    image = f"driver=qcow2,file.driver=file,file.filename={_escaped(path)}"
    answer = _run("info", "--force-share", "--output=json", "--image-opts", image)
    try:
        facts: dict[str, Any] = json.loads(answer)
    except ValueError as exc:
        raise LazyImgError(f"qemu-img info {path}: its answer is not JSON; try another version") from exc
    return facts


def _escaped(path: Path) -> str:
    # qemu's option lists: a comma in a value is written twice.
    return str(path).replace(",", ",,")


def _run(*arguments: str) -> str:
    for program in ("prlimit", "qemu-img"):
        if shutil.which(program) is None:
            package = "util-linux" if program == "prlimit" else "qemu-utils"
            raise LazyImgError(f"{program}: not found on PATH; install {package}")
    limits = [f"--as={ADDRESS_SPACE_BYTES_MAX}", f"--cpu={CPU_TIME_S_MAX}", "--"]
    # A signal's exception after the program's start and before the block that ends it would leave it running.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        process = subprocess.Popen(
            ["prlimit", *limits, "qemu-img", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "LC_ALL": "C", "LANG": "C"},
        )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    with process:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            output, complaint = process.communicate(timeout=TIME_LIMIT_S)
        except BaseException as exc:
            # A signal's exception, or no end: SIGKILL is the one that gets it out of a stalled mount.
            process.kill()
            if isinstance(exc, subprocess.TimeoutExpired):
                raise LazyImgError(
                    f"qemu-img {arguments[0]}: no end in {TIME_LIMIT_S:.0f} s; see lazyimg status"
                ) from exc
            raise
    if process.returncode != 0:
        reason = " ".join(complaint.split())[:REASON_CHARACTERS_MAX] or f"ended with {process.returncode}"
        raise LazyImgError(f"qemu-img {arguments[0]}: {reason}; the files it names are where to look")
    return output
