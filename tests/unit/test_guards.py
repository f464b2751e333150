"""The guards of tests/conftest.py catch what they are there for: each is tried on a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "conftest.py"
IMPORTS = "import logging, os, subprocess\nlog = logging.getLogger('lazyimg.part')\n"

# Each starts a pytest of its own.
pytestmark = pytest.mark.slow

Run = Callable[[str], tuple[int, str]]


@pytest.fixture
def run_session(tmp_path: Path) -> Run:
    """Return `run(body)`: exit code and output of a pytest session with this one test and our conftest."""

    def run(body: str) -> tuple[int, str]:
        (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
        (tmp_path / "test_it.py").write_text(f"{IMPORTS}\n{body}\n")
        # PYTEST_ADDOPTS would have the inner session write the outer one's report.
        environ = {key: value for key, value in os.environ.items() if key != "PYTEST_ADDOPTS"}
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(tmp_path)]
        result = subprocess.run(
            command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120, check=False
        )
        return result.returncode, result.stdout

    return run


def test_unannounced_warning_fails(run_session: Run) -> None:
    """A warning of ours that no one announced is a failure, and is shown."""
    code, output = run_session("def test_it(): log.warning('disk is odd')")
    assert code == 1
    assert "disk is odd" in output


def test_announced_warning_passes(run_session: Run) -> None:
    """An announced warning is part of the behaviour under test."""
    code, _ = run_session(
        "def test_it(expected_warnings): expected_warnings('is odd'); log.warning('disk is odd')"
    )
    assert code == 0


def test_announced_warning_must_come(run_session: Run) -> None:
    """A warning announced and not logged is a failure, unless it was announced as possible only."""
    code, output = run_session("def test_it(expected_warnings): expected_warnings('is odd')")
    assert code == 1
    assert "did not come" in output
    code, _ = run_session("def test_it(expected_warnings): expected_warnings('is odd', required=False)")
    assert code == 0


def test_process_left_behind_fails_and_is_ended(run_session: Run, tmp_path: Path) -> None:
    """A process that outlives the session fails it, also as an orphan, and does not outlive the guard."""
    pid_path = tmp_path / "pid"
    # The shell ends at once, so that its child belongs to nobody.
    code, output = run_session(
        f"def test_it(): os.system('setsid sleep 600 >/dev/null 2>&1 & echo $! > {pid_path}')"
    )
    assert code == 1
    assert "sleep 600" in output
    stat = Path("/proc", pid_path.read_text().strip(), "stat")
    # Dead, though perhaps not yet reaped by whoever is init here.
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


@pytest.mark.skipif(os.geteuid() != 0, reason="root is missing here: mounting needs it")
def test_mount_left_behind_fails_and_is_detached(run_session: Run, tmp_path: Path) -> None:
    """A mount below the session's folder fails it and is taken away."""
    body = (
        "def test_it(tmp_path): subprocess.run(['mount', '-t', 'tmpfs', 'left', str(tmp_path)], check=True)"
    )
    code, output = run_session(body)
    assert code == 1
    assert "mounts left behind" in output
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def test_missing_thing_is_named(run_session: Run) -> None:
    """A skipped test says what is missing, be it a program or a device."""
    code, output = run_session("def test_it(require): require('pytest-nonesuch')")
    assert code == 0
    assert "pytest-nonesuch is missing" in output
    _, output = run_session("def test_it(require): require('/dev/nonesuch')")
    assert "/dev/nonesuch is missing" in output
