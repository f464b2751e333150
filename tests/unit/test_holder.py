"""What a holder hands its daemon, and what it must not know."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lazyimg.config import Config
from lazyimg.daemon.handover import ConfigSource, Handover
from lazyimg.errors import ConfigError


def test_handover_arrives_as_it_was() -> None:
    """Configuration, mountpoint and the kernel's INIT survive the way to the daemon, odd bytes included."""
    config = Config(
        endpoint=("http://127.0.0.1:9292", "http://[::1]:9292"),
        cache_dir=Path("/var/lib/with blank"),
        read_timeout=1.5,
        cache_size_max="20 GiB",
        control_group="nova",
    )
    source = ConfigSource("/etc/x.toml", {"endpoint": ["http://127.0.0.1:9292"]})
    handover = Handover(
        config, source, Path("/srv/a mount/_base"), bytes(range(256)), b"\0\xff", 7, "@n", True
    )
    assert Handover.from_json(handover.to_json()) == handover
    memory = handover.to_memory()
    assert Handover.from_memory(memory) == handover
    os.close(memory)
    other = Handover(Config(), ConfigSource(), Path("/x"), b"", b"")
    assert Handover.from_json(other.to_json()) == other


def test_handover_of_another_version_is_understood() -> None:
    """[I9] What a holder of another version says beyond what is known here is left out, in the config too."""
    handover = Handover(Config(read_timeout=7), ConfigSource(), Path("/x"), b"a", b"b")
    values = json.loads(handover.to_json())
    values["of_tomorrow"] = 1
    values["config"]["key_of_tomorrow"] = "x"
    del values["config"]["restart_timeout"], values["manager"]
    assert Handover.from_json(json.dumps(values)) == handover
    values["config"]["read_timeout"] = "of another kind"
    with pytest.raises(ConfigError, match="does not fit this version"):
        Handover.from_json(json.dumps(values))


def test_configuration_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planned daemon has file, environment and flags as they are then, flags as they were given."""
    path = tmp_path / "lazyimg.toml"
    path.write_text('read_timeout = 1\ncloud = "one"\n')
    source = ConfigSource(str(path), {"endpoint": ["http://flag:1"]})
    assert source.load().read_timeout == 1
    path.write_text('read_timeout = 2\ncloud = "one"\n')
    monkeypatch.setenv("LAZYIMG_LOOKUP_TIMEOUT", "9")
    found = source.load()
    assert (found.read_timeout, found.lookup_timeout) == (2, 9)
    assert (found.endpoint, found.cloud) == (("http://flag:1",), None)


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
