"""Installs the real Glance and Keystone into a virtual environment of their own and makes their databases.

Run by `make test` before the tests.  Done once, told by a stamp that names the versions.  Without a package
index it says so and ends well: the tests then skip and name what is missing.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import venv
from pathlib import Path

VERSIONS = ("glance==33.0.0", "keystone==30.0.0", "cheroot")
FOLDER = Path(__file__).resolve().parents[2] / ".cache" / "real-glance"
VENV = FOLDER / "venv"
STAMP = FOLDER / "stamp"
# Databases with their tables and nothing in them: making these takes longer than starting the servers.
DATABASES = {"glance": FOLDER / "glance.db", "keystone": FOLDER / "keystone.db"}
# Raised when what is made here changes.
FORMAT = "2"


def is_ready() -> bool:
    """True when everything of these versions is there."""
    return STAMP.exists() and STAMP.read_text() == _stamp_text()


def set_up() -> None:
    """Install and make what is missing; several processes may call this at a time."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready():
            return
        STAMP.unlink(missing_ok=True)
        # Cleared: what an interrupted run left is not trusted.
        venv.create(VENV, with_pip=True, clear=True, symlinks=True)
        subprocess.run([VENV / "bin" / "pip", "install", "-q", *VERSIONS], check=True, timeout=600)
        for name, path in DATABASES.items():
            path.unlink(missing_ok=True)
            config = FOLDER / f"{name}.conf"
            config.write_text(f"[database]\nconnection = sqlite:///{path}\n")
            command = [str(VENV / "bin" / f"{name}-manage"), "--config-file", str(config), "db_sync"]
            subprocess.run(command, check=True, timeout=300, capture_output=True)
        STAMP.write_text(_stamp_text())


def _stamp_text() -> str:
    return " ".join([FORMAT, sys.version.split()[0], *VERSIONS])


if __name__ == "__main__":
    try:
        set_up()
    except subprocess.SubprocessError as exc:
        print(f"no real Glance to test against, its tests will skip: {exc}", file=sys.stderr)
