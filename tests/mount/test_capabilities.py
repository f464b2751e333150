"""The mount works with the capabilities that the unit leaves it, and no others."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from acting_user import NOBODY, run_as
from real_mount import Mount, is_mounted, wait_until
from served_glance import MIB, ServedGlance

UNIT = Path(__file__).parents[2] / "systemd" / "lazyimg.service"


def unit_capabilities() -> list[str]:
    (line,) = re.findall(r"^CapabilityBoundingSet=(.*)$", UNIT.read_text(), re.MULTILINE)
    return [name.removeprefix("CAP_").lower() for name in line.split()]


def bounded(capabilities: list[str]) -> list[str]:
    """Return the start of a command line that runs the rest with these capabilities at most."""
    return ["setpriv", "--bounding-set", ",".join(["-all", *(f"+{name}" for name in capabilities)]), "--"]


def effective(pid: int) -> int:
    """Return a process's capabilities as the kernel counts them (proc_pid_status(5))."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"^CapEff:\s+([0-9a-f]+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]


def test_mount_needs_no_more_than_the_unit_gives(
    make_mount: Callable[..., Mount], glance: ServedGlance, require: Callable[..., None], tmp_path: Path
) -> None:
    """Lookups, reads, another user's and root's changes below, a killed daemon, a busy umount and its end: all work."""
    require("setpriv")
    capabilities = unit_capabilities()
    image = glance.add(2 * MIB)
    tmp_path.chmod(0o755)
    mount = make_mount(glance, start=False, prefix=bounded(capabilities))
    mount.path.chmod(0o777)
    mount.start()
    for pid in (mount.holder_pid, mount.status()["daemon_pid"]):
        assert effective(pid).bit_count() == len(capabilities)

    # Lookups and reads.
    assert mount.path_of(image).read_bytes() == image.content
    assert run_as(mount.path, f"result = open('{image.base_name}', 'rb').read(16).hex()") == (
        image.content[:16].hex()
    )
    # Another user makes, changes, moves and removes.
    made = run_as(
        mount.path,
        "open('a', 'w').write('hi')\n"
        "os.mkdir('d'); os.rename('a', 'd/b'); os.symlink('b', 'd/c'); os.link('d/b', 'd/h'); os.mkfifo('d/p')\n"
        "os.chmod('d/b', 0o600); os.utime('d/b', (1, 1))\n"
        "result = [owned('d'), owned('d/b'), owned('d/c'), os.stat('d/b').st_mtime, open('d/b').read()]\n"
        "[os.unlink('d/' + name) for name in 'bchp']; os.rmdir('d')",
    )
    mine = [NOBODY, NOBODY]
    assert made == [[*mine, "0o755"], [*mine, "0o600"], [*mine, "0o777"], 1.0, "hi"]
    # Root gives away, with the set-group-id bit kept.
    given = mount.path / "given"
    given.touch()
    os.chown(given, NOBODY, NOBODY)
    given.chmod(0o2750)
    os.utime(given, (2, 2))
    found = given.stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode), found.st_mtime) == (NOBODY, 0o2750, 2.0)
    given.unlink()

    # Another daemon takes over, asked to and not.
    mount.client().restart()
    killed = mount.kill_daemon()
    wait_until(lambda: mount.is_ready() and mount.status()["daemon_pid"] != killed, "the next daemon")
    assert mount.path_of(image).read_bytes() == image.content

    # A busy mount is not left, and who holds it is named, whoever it is.
    with subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os, time; os.chdir({str(mount.path)!r}); os.setuid({NOBODY}); time.sleep(600)",
        ]
    ) as guest:
        try:
            wait_until(lambda: os.readlink(f"/proc/{guest.pid}/cwd") == str(mount.path), "the guest")
            wait_until(lambda: f"Uid:\t{NOBODY}" in Path(f"/proc/{guest.pid}/status").read_text(), "the user")
            os.kill(mount.holder_pid, signal.SIGTERM)
            wait_until(lambda: f"pid {guest.pid}, working folder" in mount.log(), "the refusal")
        finally:
            guest.kill()
    assert mount.stop() == 0
    assert not is_mounted(mount.path)
