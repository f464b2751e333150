"""The daemon that runs here, if one does, through its control socket."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from lazyimg import __version__
from lazyimg.control import ControlClient
from lazyimg.doctor.finding import Finding, fail, ok, warn
from lazyimg.errors import DaemonUnreachable, LazyImgError


def daemon_checks(control: Path) -> Iterator[tuple[str, Callable[[], Finding]]]:
    """Yield each check by its name; they block, and raise nothing but OSError."""
    yield "control socket", partial(socket, control)
    yield "daemon", partial(daemon, control)


def socket(path: Path) -> Finding:
    """Whether only who may can reach the socket, or put another in its place."""
    name = "control socket"
    try:
        found, folder = path.lstat(), path.parent.stat()
    except FileNotFoundError:
        return ok(name, f"{path} is not there")
    if not stat.S_ISSOCK(found.st_mode):
        return fail(name, f"{path} is no socket", "remove it, or give another control")
    if found.st_mode & 0o007:
        return warn(name, f"{path} can be used by everybody", 'set control_mode = "0660" and control_group')
    is_sticky = folder.st_mode & stat.S_ISVTX
    if (folder.st_mode & 0o022 and not is_sticky) or folder.st_uid not in (0, found.st_uid):
        return warn(
            name,
            f"others may put a socket of theirs in {path.parent}",
            f"`chmod go-w {path.parent}`, or put control into a folder of its own",
        )
    return ok(name, f"{path}, mode {stat.S_IMODE(found.st_mode):04o}")


def daemon(path: Path) -> Finding:
    """Whether the daemon answers, is of this version, and is well."""
    try:
        status = ControlClient(path).status()
    except DaemonUnreachable as exc:
        if not os.path.lexists(path):
            return ok("daemon", "none runs here")
        return warn("daemon", str(exc), "see its log: `journalctl -u lazyimg`")
    except LazyImgError as exc:
        return warn("daemon", str(exc), "see its log: `journalctl -u lazyimg`")
    return _judged(status)


def _judged(status: dict[str, Any]) -> Finding:
    who = f"pid {status.get('daemon_pid')}, version {status.get('version', 'unknown')}"
    for field, what, advice in (
        (
            "requests_stuck",
            "requests are stuck in the kernel",
            "detach the mount with `lazyimg umount --lazy`",
        ),
        ("reads_hung", "reads hang", "see `lazyimg status` for what they wait for"),
        ("unforeseen_errors", "requests failed by a fault of lazyimg's own", "see the log and report it"),
    ):
        if status.get(field):
            return warn("daemon", f"{who}: {status[field]} {what}", advice)
    if status.get("version") != __version__:
        return warn("daemon", f"{who}; {__version__} is installed", "`lazyimg restart`")
    return ok("daemon", who)
