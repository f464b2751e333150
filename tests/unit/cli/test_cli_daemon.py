"""The commands that run something else: mount, umount and demo, with stand-ins for what they run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripted_daemon import Outcome

from lazyimg.cli import mount as cli_mount
from lazyimg.config import Config
from lazyimg.daemon.handover import ConfigSource

# ── what runs the daemon and the demo ──


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[..., Any]], None]:
    """Put a module with one function in the place of one whose work needs a mount."""

    def stand_in(module: str, name: str, function: Callable[..., Any]) -> None:
        stub = ModuleType(module)
        setattr(stub, name, function)
        monkeypatch.setitem(sys.modules, module, stub)

    return stand_in


def test_mount_gets_config_and_gives_its_exit_code(
    run: Callable[..., Outcome],
    stand_in: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flags win over the file; endpoints may be repeated; what the daemon returns is the exit code."""
    got: list[tuple[Config, Path]] = []

    def run_mount(config: Config, source: ConfigSource, mountpoint: Path) -> int:
        # What a planned daemon will read is the same.
        assert source.load() == config
        got.append((config, mountpoint))
        return 6

    stand_in("lazyimg.daemon.holder", "run_mount", run_mount)
    monkeypatch.setattr(cli_mount, "set_up_logging", lambda level: None)
    file = tmp_path / "f.toml"
    file.write_text('read_timeout = 7\ncache_dir = "/from/file"\ncloud = "c"\n')
    flags = ["--endpoint", "http://a", "--endpoint", "http://b", "--cache-dir", tmp_path / "d"]
    assert run("mount", tmp_path / "mnt", "--config", file, *flags, "--control", tmp_path / "s").code == 6
    config, mountpoint = got[0]
    assert mountpoint == tmp_path / "mnt"
    assert (config.endpoint, config.cloud) == (("http://a", "http://b"), None)
    assert (config.cache_dir, config.control, config.read_timeout) == (tmp_path / "d", tmp_path / "s", 7)


def test_mount_refuses_a_bad_config_before_anything(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """An unknown key, two places for Glance or a missing file is 2 and one line."""
    file = tmp_path / "f.toml"
    file.write_text("colour = 1\n")
    outcome = run("mount", tmp_path / "mnt", "--config", file)
    assert outcome.code == 2
    assert outcome.err.startswith(f"lazyimg: config key 'colour' ({file}): unknown")
    assert run("mount", tmp_path / "mnt", "--endpoint", "http://a", "--cloud", "b").code == 2
    assert run("mount", tmp_path / "mnt", "--config", tmp_path / "none").code == 2


def test_umount_passes_lazy_on(run: Callable[..., Outcome], stand_in: Callable[..., None]) -> None:
    """--lazy detaches, without it a busy mount stays."""
    got = []
    stand_in("lazyimg.daemon.mountpoint", "umount", lambda path, *, lazy: got.append((path, lazy)))
    assert run("umount", "/no").code == run("umount", "--lazy", "/no").code == 0
    assert got == [(Path("/no"), False), (Path("/no"), True)]


def test_demo_gives_its_exit_code(run: Callable[..., Outcome], stand_in: Callable[..., None]) -> None:
    """What the demo returns is the exit code."""
    stand_in("lazyimg.demo.run", "run_demo", lambda *, keep: 40 + keep)
    assert [run("demo").code, run("demo", "--keep").code] == [40, 41]


@pytest.mark.parametrize(("is_journal", "pattern"), [(True, "W m: x\n"), (False, "20")])
def test_log_lines_have_a_time_unless_the_journal_adds_it(is_journal: bool, pattern: str) -> None:
    """Under systemd the journal has the time already."""
    script = (
        "import logging; from lazyimg.logs import set_up_logging\n"
        "set_up_logging('WARNING'); log = logging.getLogger('m')\n"
        "log.info('no'); log.warning('x')"
    )
    environment = {**os.environ, "JOURNAL_STREAM": "8:1"}
    if not is_journal:
        del environment["JOURNAL_STREAM"]
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(pattern.replace("W ", "WARNING "))
