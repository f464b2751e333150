"""Boots a guest in qemu and waits for its own word on the serial console.

The guest is given a random token on its kernel command line and answers with a line that repeats it: only a
guest that got as far as its own init on its root disk can.  `lazyimg-guest TOKEN ok …` is success.
"""

from __future__ import annotations

import os
import re
import secrets
import select
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lazyimg.demo.programs import started, wait_until_ended
from lazyimg.errors import LazyImgError

Accelerator = Literal["kvm", "tcg"]

# panic=-1 with qemu's -no-reboot: a guest that cannot go on ends at once instead of waiting for the deadline.
# no_timer_check: on a busy host an emulated timer comes late, and the kernel's own check of it then panics: 4 of
# 42 boots, 14 of them at a time on 2 cores; none of 42 with it (measured 2026-11).
BOOT_APPEND = "console=ttyS0 root=/dev/vda rw quiet panic=-1 no_timer_check"
BOOT_TIMEOUT_S = 120.0
_MEMORY_MIB = 512
# What a guest may print: a console gone wild must not fill our memory.
_SERIAL_BYTES_MAX = 8 << 20
# A working KVM brings the kernel to its panic in under a second, and even TCG in 2.4 s (measured 2026-11 on 2
# cores).  A boot sector is no probe: on that machine KVM ran one, in 3.4 s, and hung in the kernel.
_PROBE_TIMEOUT_S = 5.0
_PROBE_WORD = re.compile(rb"Kernel panic - not syncing: VFS")
_POWEROFF_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class BootResult:
    """What a boot showed: seconds from qemu's start to the guest's word, the word, and the whole console."""

    seconds: float
    word: str
    serial: str


def boot_guest(
    kernel: Path,
    ramdisk: Path,
    disk: Path | str,
    disk_format: Literal["qcow2", "raw"],
    *,
    append: str = BOOT_APPEND,
    timeout_s: float = BOOT_TIMEOUT_S,
    accelerator: Accelerator = "tcg",
) -> BootResult:
    """Boot, wait for the guest's word and for its power-off, and return what it said.

    `disk` is a path or what else qemu takes as a file, such as an nbd URL; it is written to.  Raises
    LazyImgError when the guest says failed, is silent for `timeout_s`, or ends without a word.  No qemu is
    left running, whatever happens.
    """
    token = secrets.token_hex(8)
    argv = qemu_command(accelerator, kernel, f"{append} lazyimg.token={token}")
    argv += disk_options(ramdisk, disk, disk_format)
    start = time.monotonic()
    word = re.compile(rb"lazyimg-guest %s ([^\r\n]*)\r?\n" % token.encode())
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        serial, match = _read_until(qemu, word, start + timeout_s)
        seconds = time.monotonic() - start
        if match is None:
            ended = time.monotonic() < start + timeout_s
            raise LazyImgError(_silence(serial, "it ended" if ended else f"{timeout_s:.0f} s went by"))
        said = match[1].decode(errors="replace")
        if said.split()[:1] != ["ok"]:
            raise LazyImgError(f"guest on {disk}: it says {said!r}: a file it read is not as it was made")
        # To its power-off: what it wrote is then on the disk.
        serial += _read_until(qemu, None, time.monotonic() + _POWEROFF_TIMEOUT_S)[0]
        wait_until_ended(qemu, "qemu after the guest's power-off", timeout_s=_POWEROFF_TIMEOUT_S)
    return BootResult(seconds, said, serial.decode(errors="replace"))


def choose_accelerator(kernel: Path) -> Accelerator:
    """Return kvm if it really runs this kernel, else tcg: on some machines /dev/kvm opens and guests hang."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    # No disk and no initramfs: a kernel that runs ends in a panic that says so.
    argv = qemu_command("kvm", kernel, "console=ttyS0 panic=-1 no_timer_check")
    with started(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as qemu:
        _, match = _read_until(qemu, _PROBE_WORD, time.monotonic() + _PROBE_TIMEOUT_S)
    return "kvm" if match else "tcg"


def qemu_command(accelerator: Accelerator, kernel: Path, append: str) -> list[str]:
    """Return the command of a guest without disks, its console on standard input and output."""
    cpu = "host" if accelerator == "kvm" else "max"
    return [
        *("qemu-system-x86_64", "-accel", accelerator, "-cpu", cpu, "-m", str(_MEMORY_MIB)),
        *("-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio"),
        *("-kernel", str(kernel), "-append", append),
    ]


def disk_options(ramdisk: Path, disk: Path | str, disk_format: Literal["qcow2", "raw"]) -> list[str]:
    """Return what gives that guest its ramdisk, and its disk past the host's page cache."""
    drive = f"file={str(disk).replace(',', ',,')},format={disk_format},if=virtio,cache=none"
    return ["-initrd", str(ramdisk), "-drive", drive]


def _read_until(
    qemu: subprocess.Popen[bytes], wanted: re.Pattern[bytes] | None, deadline: float
) -> tuple[bytes, re.Match[bytes] | None]:
    """Read the console until it shows `wanted`, ends, has said too much, or the deadline passes."""
    assert qemu.stdout is not None
    console = qemu.stdout.fileno()
    text = b""
    while len(text) < _SERIAL_BYTES_MAX:
        ready, _, _ = select.select([console], [], [], max(0, deadline - time.monotonic()))
        block = os.read(console, 1 << 16) if ready else b""
        if not block:
            break
        # The word may be cut by a block's end, so the whole text is searched; it is a few KiB.
        text += block
        if wanted is not None and (match := wanted.search(text)):
            return text, match
    return text, None


def _silence(serial: bytes, what_happened: str) -> str:
    lines = [line.strip() for line in serial.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return f"guest: {what_happened} without its word; it printed nothing"
    # A panic is followed by a trace that tells nobody anything.
    reason = next((line for line in lines if "Kernel panic" in line), lines[-1])
    return f"guest: {what_happened} without its word; it said {reason!r}"
