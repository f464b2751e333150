"""Installs the real Nova into a virtual environment of its own.

Run by `make test` before the tests.  Done once, told by a stamp that names the versions.  Without a package
index it says so and ends well: the tests then skip and name what is missing.
"""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

# testtools and wsgi-intercept: nova's own stand-in for libvirt, which it ships, is made with them.
VERSIONS = ("nova==34.0.0", "testtools", "wsgi-intercept")
ROOT = Path(__file__).resolve().parents[2]


def _is_reachable(path: Path) -> bool:
    """True if every user may pass through the folder and all above it."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))


# In the checkout, if Nova's user can come there; a folder of root's alone, such as mkdtemp makes, it cannot enter.
FOLDER = ROOT / ".cache" / "real-nova" if _is_reachable(ROOT) else Path("/var/tmp/lazyimg-real-nova")
VENV = FOLDER / "venv"
# The system's: Nova runs as a user who need not be able to reach the Python that runs the tests.
PYTHON = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
STAMP = FOLDER / "stamp"
INSTALL_TIMEOUT_S = 600


def is_ready() -> bool:
    """True when everything of these versions is there."""
    return STAMP.exists() and STAMP.read_text() == _stamp_text()


def set_up() -> None:
    """Install what is missing; several processes may call this at a time."""
    FOLDER.mkdir(mode=0o755, parents=True, exist_ok=True)
    if FOLDER.stat(follow_symlinks=False).st_uid != os.geteuid():
        raise PermissionError(f"{FOLDER} belongs to another user; remove it")
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready():
            return
        STAMP.unlink(missing_ok=True)
        # Cleared: what an interrupted run left is not trusted.
        subprocess.run([PYTHON, "-m", "venv", "--clear", VENV], check=True, timeout=INSTALL_TIMEOUT_S)
        pip = [VENV / "bin" / "pip", "install", "-q", "--retries", "10", *VERSIONS]
        subprocess.run(pip, check=True, timeout=INSTALL_TIMEOUT_S)
        STAMP.write_text(_stamp_text())


def _stamp_text() -> str:
    version = subprocess.run([PYTHON, "--version"], check=True, capture_output=True, text=True).stdout.split()
    return " ".join([*version, *VERSIONS])


if __name__ == "__main__":
    try:
        set_up()
    except subprocess.SubprocessError as exc:
        print(f"no real Nova to test with, its tests will skip: {exc}", file=sys.stderr)
