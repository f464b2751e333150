"""The mountpoint from outside: mounting, unmounting, and who holds it.

Nothing here opens or stats a path under the mount (I11): /proc answers, so it works while the mount hangs.
fusermount3 mounts and unmounts, for root and for others alike.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lazyimg.errors import InUse, MountFailed

FUSERMOUNT = "fusermount3"
# fusermount3 itself only talks to the kernel; a minute means that the machine is in deep trouble.
FUSERMOUNT_TIMEOUT_S = 60
FILE_SYSTEM_TYPE = "fuse.lazyimg"
# Processes named in one message; more would not be read.
HOLDERS_NAMED_MAX = 10


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that keeps a mount busy, and with what."""

    pid: int
    command: str
    what: str

    def __str__(self) -> str:
        return f"{self.command} (pid {self.pid}, {self.what})"


def mount(mountpoint: Path, *, allow_other: bool) -> int:
    """Mount a FUSE file system there and return its /dev/fuse descriptor.

    The caller owns the descriptor.  Raises InUse where something of ours is mounted and alive, MountFailed else.
    """
    options = "rw,nosuid,nodev,default_permissions,fsname=lazyimg,subtype=lazyimg"
    if allow_other:
        options += ",allow_other"
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        result = _fusermount(
            ["-o", options, "--", str(mountpoint)],
            env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        if result.returncode != 0:
            raise MountFailed(
                f"mountpoint {mountpoint}: {_said(result)}; check that /dev/fuse is there, or run as root"
            )
        fds = array.array("i")
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(fds.itemsize))
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: fds.itemsize])
        if not fds:
            raise MountFailed(f"mountpoint {mountpoint}: {FUSERMOUNT} handed over no descriptor; try again")
        return fds[0]


def check_mountpoint(mountpoint: Path) -> None:
    """Raise unless `mountpoint` is a folder with nothing mounted on it; detach what a dead daemon left there."""
    kind = mounted_type(mountpoint)
    if kind is not None:
        if kind != FILE_SYSTEM_TYPE:
            raise InUse(
                f"mountpoint {mountpoint}: a {kind} file system is mounted there; choose another folder"
            )
        if is_alive(mountpoint):
            raise InUse(f"mountpoint {mountpoint}: lazyimg is mounted there; `lazyimg umount` it first")
        detach(mountpoint)
    try:
        mode = os.stat(mountpoint).st_mode
    except OSError as exc:
        raise MountFailed(f"mountpoint {mountpoint}: {exc.strerror}; create the folder first") from exc
    if not stat.S_ISDIR(mode):
        raise MountFailed(f"mountpoint {mountpoint}: not a folder; give a folder")


def is_alive(mountpoint: Path) -> bool:
    """True while a daemon or its holder keeps this mount's /dev/fuse open; the kernel says ENOTCONN otherwise.

    Called by the command line only, never by the daemon whose mount it is (I11).
    """
    try:
        os.statvfs(mountpoint)
    except OSError:
        return False
    return True


def umount(mountpoint: Path, *, lazy: bool = False) -> None:
    """Unmount; with `lazy`, detach now and let the last user end it.

    Raises MountFailed where lazyimg is not mounted, InUse naming the processes that hold it.
    """
    mountpoint = Path(os.path.abspath(mountpoint))
    kind = mounted_type(mountpoint)
    if kind != FILE_SYSTEM_TYPE:
        raise MountFailed(
            f"mountpoint {mountpoint}: lazyimg is not mounted there; see `mount -t fuse.lazyimg`"
        )
    if lazy:
        detach(mountpoint)
        return
    result = _fusermount(["-u", "--", str(mountpoint)])
    if result.returncode == 0:
        return
    holders = list(holders_of(mountpoint))
    if not holders and "busy" not in result.stderr.lower():
        raise MountFailed(f"mountpoint {mountpoint}: {_said(result)}")
    raise InUse(
        f"mountpoint {mountpoint}: busy: {describe(holders)}; end them, or detach it with `lazyimg umount --lazy`"
    )


def detach(mountpoint: Path) -> None:
    """Take the mount out of the tree at once; open files go on until they are closed.  Raises MountFailed."""
    result = _fusermount(["-u", "-z", "--", str(mountpoint)])
    if result.returncode != 0:
        raise MountFailed(f"mountpoint {mountpoint}: {_said(result)}")


def describe(holders: list[Holder]) -> str:
    """Return the holders in words, the first few by name."""
    if not holders:
        return "held by the kernel (a loop device, a swap file or another mount namespace)"
    named = ", ".join(str(holder) for holder in holders[:HOLDERS_NAMED_MAX])
    more = len(holders) - HOLDERS_NAMED_MAX
    return named + (f" and {more} more" if more > 0 else "")


def mounted_type(mountpoint: Path) -> str | None:
    """Return the type of the topmost file system mounted exactly there, None if it is no mountpoint."""
    found = _mount_at(mountpoint)
    return None if found is None else found.kind


def device_of(mountpoint: Path) -> str | None:
    """Return "major:minor" of what is mounted there, as in /sys/class/bdi; None if nothing is."""
    found = _mount_at(mountpoint)
    return None if found is None else found.device


@dataclass(frozen=True, slots=True)
class _Mount:
    id: str
    device: str
    kind: str


def _mount_at(mountpoint: Path) -> _Mount | None:
    """Return the topmost mount at exactly this path."""
    found = None
    wanted = os.path.abspath(mountpoint)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        # proc_pid_mountinfo(5): mount ID, parent, major:minor, root, mountpoint (octal-escaped), ... - type ...
        before, _, after = line.partition(" - ")
        mount_id, _, device, _, where = before.split()[:5]
        if _unescape(where) == wanted:
            found = _Mount(mount_id, device, after.split()[0])
    return found


def holders_of(mountpoint: Path) -> Iterator[Holder]:
    """Yield each process with a file, working folder, root, executable or mapping under the mount.

    By reading links and maps in /proc, never the files: it works on a mount that does not answer.  Processes
    that may not be looked at, or end meanwhile, are left out.
    """
    prefix = os.path.abspath(mountpoint)
    mount = _mount_at(mountpoint)
    mount_id = "" if mount is None else mount.id
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            what = _what_is_held(Path("/proc", name), prefix, mount_id)
            if what is not None:
                yield Holder(int(name), Path("/proc", name, "comm").read_text().strip(), what)


def _what_is_held(process: Path, prefix: str, mount_id: str) -> str | None:
    for link, name in (("cwd", "working folder"), ("root", "root folder"), ("exe", "executable")):
        with contextlib.suppress(OSError):
            if _is_under(os.readlink(process / link), prefix):
                return name
    for fd in os.listdir(process / "fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(process / "fd" / fd)
            # The upper folder, which daemon and holder keep open, has the same path but is another mount's.
            if (
                _is_under(target, prefix)
                and f"mnt_id:\t{mount_id}\n" in (process / "fdinfo" / fd).read_text()
            ):
                return f"open {os.path.relpath(target, prefix)}"
    for line in (process / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _is_under(fields[5], prefix):
            return f"mapped {os.path.relpath(fields[5], prefix)}"
    return None


def _is_under(path: str, prefix: str) -> bool:
    return path == prefix or path.startswith(prefix + "/")


def _unescape(field: str) -> str:
    return field.encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")


def _fusermount(
    arguments: list[str], *, env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
) -> subprocess.CompletedProcess[str]:
    # C locale: "busy" is read out of its message.
    env = {**(env or os.environ), "LC_ALL": "C"}
    try:
        return subprocess.run(
            [FUSERMOUNT, *arguments],
            env=env,
            pass_fds=pass_fds,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FUSERMOUNT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError as exc:
        raise MountFailed(f"{FUSERMOUNT} not found; install the package fuse3") from exc
    except subprocess.TimeoutExpired as exc:
        raise MountFailed(f"{FUSERMOUNT} did not end within {FUSERMOUNT_TIMEOUT_S} s; see `dmesg`") from exc


def _said(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"{FUSERMOUNT} ended with {result.returncode}"
