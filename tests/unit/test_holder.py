"""What a holder hands its daemon, and what it must not know."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from lazyimg.config import Config
from lazyimg.daemon.holder import Handover


def test_handover_arrives_as_it_was() -> None:
    """Configuration, mountpoint and the kernel's INIT survive the way to the daemon, odd bytes included."""
    config = Config(
        endpoint=("http://127.0.0.1:9292", "http://[::1]:9292"),
        cache_dir=Path("/var/lib/with blank"),
        read_timeout=1.5,
        cache_size_max="20 GiB",
        control_group="nova",
    )
    handover = Handover(config, Path("/srv/a mount/_base"), bytes(range(256)), is_resumed=True)
    assert Handover.from_json(handover.to_json()) == handover
    other = Handover(Config(), Path("/x"), b"", is_resumed=False)
    assert Handover.from_json(other.to_json()) == other


def test_holder_knows_neither_glance_nor_the_cache() -> None:
    """The holder stays small: what could fail in a daemon is not even imported in it."""
    script = (
        "import sys, lazyimg.daemon.holder; print(' '.join(sorted(n for n in sys.modules"
        " if n.split('.')[0] in ('httpx', 'trio', 'pyfuse3', 'diskcache', 'openstack')"
        " or n.startswith(('lazyimg.glance', 'lazyimg.store', 'lazyimg.image')))))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_daemon_started_by_hand_says_how_to_start_it() -> None:
    """Without the descriptors of a holder the daemon ends with exit code 2 and one line."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("LISTEN_")}
    result = subprocess.run(
        [sys.executable, "-m", "lazyimg.daemon.service"],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("lazyimg: the daemon is started by `lazyimg mount`")
    assert result.stderr.count("\n") == 1
