"""Programs run as another user inside a mount, for what depends on who asks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOBODY = 65534
# The interpreter starts as root and becomes the user then: neither it nor the folders above the working folder,
# pytest's own, need be open to him.
_PRELUDE = """
import errno, json, os, stat, sys
os.setgroups({groups})
os.setresgid({gid}, {gid}, {gid})
os.setresuid({uid}, {uid}, {uid})
os.umask({umask})
def attempt(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except OSError as exc:
        return errno.errorcode[exc.errno]
def owned(path):
    found = os.lstat(path)
    return [found.st_uid, found.st_gid, oct(stat.S_IMODE(found.st_mode))]
"""


def run_as(
    folder: Path,
    program: str,
    *,
    uid: int = NOBODY,
    gid: int = NOBODY,
    groups: Sequence[int] = (),
    umask: int = 0o022,
) -> Any:
    """Run a Python program with `folder` as its working folder; return what it assigned to `result`.

    It has `attempt(function, *args)`, which gives the errno's name or None, and `owned(path)`: owner, group, mode.
    """
    prelude = _PRELUDE.format(groups=list(groups), gid=gid, uid=uid, umask=umask)
    done = subprocess.run(
        [sys.executable, "-c", f"{prelude}\n{program}\nprint(json.dumps(result))"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
