"""Kernel, FUSE, programs and limits of this machine.

Files are read below `root`, which is / but for tests, programs are looked for in `path`.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lazyimg.core.kernel import can_resend
from lazyimg.doctor.finding import Finding, fail, ok, warn

# A program that only prints its version.
PROGRAM_TIMEOUT_S = 10
# What the unit sets: one for each open image, each file that guests hold in the upper folder, each request.
DESCRIPTORS = 65536


@dataclass(frozen=True, slots=True)
class Machine:
    """What is examined; the defaults are this machine."""

    root: Path = Path("/")
    release: str = ""
    path: str = os.defpath
    is_root: bool = False
    descriptors_max: int = 0

    @classmethod
    def this(cls) -> Machine:
        # The mke2fs family and its like live in sbin, which is not on every user's PATH.
        path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        return cls(Path("/"), os.uname().release, path, os.geteuid() == 0, hard)


def machine_checks(
    machine: Machine, *, allow_other: bool, mountpoint: Path | None
) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield each check by its name; they block, and raise nothing but OSError."""
    yield "kernel", partial(kernel, machine)
    yield "/dev/fuse", partial(fuse_device, machine)
    yield "fusermount3", partial(fusermount, machine)
    if allow_other:
        yield "allow_other", partial(allow_others, machine)
    yield "fusectl", partial(fusectl, machine)
    yield "qemu-img", partial(qemu_img, machine)
    yield "descriptors", partial(descriptors, machine)
    yield "confinement", partial(confinement, machine)
    if mountpoint is not None:
        yield "propagation", partial(propagation, machine, mountpoint)


def kernel(machine: Machine) -> Finding:
    """Whether what a killed daemon had taken is sent to the next one."""
    if can_resend(machine.release):
        return ok("kernel", f"Linux {machine.release}: a daemon that is killed costs no guest a read")
    return warn(
        "kernel",
        f"Linux {machine.release}: what a killed daemon had taken is lost, and hangs",
        "use Linux 6.9 or later; until then restart the daemon only in the ways docs/operations.md gives",
    )


def fuse_device(machine: Machine) -> Finding:
    """Whether /dev/fuse opens."""
    try:
        os.close(os.open(machine.root / "dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return fail("/dev/fuse", "missing", "load it with `modprobe fuse`, or give the container the device")
    except OSError as exc:
        return fail(
            "/dev/fuse", f"cannot be opened: {exc.strerror}", "run as root, or allow this user the device"
        )
    return ok("/dev/fuse", "opens")


def fusermount(machine: Machine) -> Finding:
    """Whether fusermount3 is there, and may mount for this user."""
    program = shutil.which("fusermount3", path=machine.path)
    if program is None:
        return fail("fusermount3", "not found", "install the package fuse3")
    if not machine.is_root and not os.stat(program).st_mode & stat.S_ISUID:
        return fail(
            "fusermount3",
            f"{program} is not setuid root",
            "run as root, or `chmod u+s` it as its package does",
        )
    return ok("fusermount3", _said(program, "--version"))


def allow_others(machine: Machine) -> Finding:
    """Whether this user may let others, such as qemu, read the mount."""
    if machine.is_root:
        return ok("allow_other", "root may always")
    try:
        lines = (machine.root / "etc/fuse.conf").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    if any(line.strip() == "user_allow_other" for line in lines):
        return ok("allow_other", "/etc/fuse.conf has user_allow_other")
    return fail(
        "allow_other",
        "/etc/fuse.conf does not have user_allow_other",
        "add that line, run as root, or set allow_other = false",
    )


def fusectl(machine: Machine) -> Finding:
    """Whether the kernel's own count of waiting requests can be read."""
    for line in (machine.root / "proc/mounts").read_text().splitlines():
        if line.split()[2:3] == ["fusectl"]:
            return ok("fusectl", "mounted: status can tell requests that are stuck")
    return warn(
        "fusectl",
        "not mounted: status cannot tell requests that are stuck",
        "`mount -t fusectl none /sys/fs/fuse/connections`",
    )


def qemu_img(machine: Machine) -> Finding:
    """Whether qemu-img is there; only the companion needs it."""
    program = shutil.which("qemu-img", path=machine.path)
    if program is None:
        return warn(
            "qemu-img",
            "not found: `lazyimg overlay` and `lazyimg instance` need it",
            "install the package qemu-utils",
        )
    return ok("qemu-img", _said(program, "--version"))


def descriptors(machine: Machine) -> Finding:
    """How many files a daemon started from here could hold."""
    if machine.descriptors_max in (resource.RLIM_INFINITY, -1) or machine.descriptors_max >= DESCRIPTORS:
        return ok("descriptors", f"a process may open {machine.descriptors_max}")
    return warn(
        "descriptors",
        f"a process may open {machine.descriptors_max}: each open image, and each file guests hold, takes one",
        f"start it by the unit, which sets LimitNOFILE={DESCRIPTORS}",
    )


def confinement(machine: Machine) -> Finding:
    """Whether SELinux would keep guests from reading a FUSE file system."""
    if _text(machine.root / "sys/fs/selinux/enforce") == "1":
        allowed = _text(machine.root / "sys/fs/selinux/booleans/virt_use_fusefs").split()
        if allowed[:1] == ["1"]:
            return ok("confinement", "SELinux enforces, and virt_use_fusefs is on")
        return fail(
            "confinement",
            "SELinux enforces, and virt_use_fusefs is off: guests may not read a FUSE file system",
            "`setsebool -P virt_use_fusefs on`",
        )
    if _text(machine.root / "sys/module/apparmor/parameters/enabled") == "Y":
        return ok("confinement", "AppArmor is on; where it denies a guest something `journalctl -k` says so")
    return ok("confinement", "neither SELinux nor AppArmor")


def propagation(machine: Machine, mountpoint: Path) -> Finding:
    """Whether a mount there reaches the mount namespaces of others, such as libvirt's."""
    where, is_shared = "", False
    for line in (machine.root / "proc/self/mountinfo").read_text().splitlines():
        # proc_pid_mountinfo(5): ..., mountpoint, options, optional fields, "-", type, ...
        fields, _, kind = line.partition(" - ")
        mounted = fields.split()[4]
        is_above = mountpoint == Path(mounted) or Path(mounted) in mountpoint.parents
        # The mount of lazyimg itself says nothing of where it will be mounted next.
        if is_above and len(mounted) >= len(where) and not kind.startswith("fuse.lazyimg"):
            where, is_shared = mounted, "shared:" in fields
    if is_shared:
        return ok("propagation", f"{where} is shared: what is mounted in {mountpoint} is seen by all")
    return warn(
        "propagation",
        f"{where} is private: a libvirt or Nova in a mount namespace of its own does not see {mountpoint}",
        f"`mount --make-rshared {where}` before they start, if they have one",
    )


def _said(program: str, option: str) -> str:
    """Return the first line that a program prints."""
    try:
        result = subprocess.run(
            [program, option],
            capture_output=True,
            text=True,
            timeout=PROGRAM_TIMEOUT_S,
            check=False,
            cwd="/",
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return f"{program} is there and does not answer"
    first = next(iter((result.stdout or result.stderr).splitlines()), "")
    version = re.search(r"version:? (\S+)", first)
    return f"{program} {version[1]}" if version else program


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        # What is not there is not in force.
        return ""
