"""Two minutes of benchmarks/torture.py: everything strikes at once, other than in any other test.

Expected: whatever the seed, no wrong byte, no failed read, no traceback, no upper file other than it was written, and
descriptors and memory as at the beginning.  The seed of a run that failed is in its output: `--seed` strikes alike.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from kernel_marks import needs_resend

pytestmark = pytest.mark.slow

TORTURE = Path(__file__).parents[2] / "benchmarks" / "torture.py"
MINUTES = 2


@needs_resend
def test_nothing_is_lost_in_two_minutes_of_torture(mountable: None, require: Callable[..., None]) -> None:
    """[I1] [I9] Readers and writers that check every byte find none wrong while all else is struck at random."""
    require("unshare", "setpriv", "qemu-img", "qemu-io")
    if os.geteuid() != 0:
        pytest.skip("root is missing here: torture.py runs in namespaces of its own")
    # A short path: the control socket's must fit into 108 bytes (unix(7)).
    command = [sys.executable, TORTURE, "--minutes", str(MINUTES), "--work-dir", tempfile.gettempdir()]
    # Where a script's own folder is not looked in (PYTHONSAFEPATH), what lies beside it is found all the same.
    environ = os.environ | {"PYTHONPATH": os.fspath(TORTURE.parent)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=MINUTES * 60 + 120, env=environ, check=False
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "wrong bytes: 0 reads" in done.stdout
