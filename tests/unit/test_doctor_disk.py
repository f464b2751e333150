"""The doctor's look at the cache disk and at the daemon's socket."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lazyimg import __version__
from lazyimg.control import ControlClient
from lazyimg.doctor import cachedisk, mounted
from lazyimg.doctor.cachedisk import cache_checks
from lazyimg.doctor.finding import Finding
from lazyimg.doctor.mounted import daemon_checks
from lazyimg.errors import DaemonUnreachable

MOUNTED = "22 1 8:1 / / rw - {} /dev/sda rw\n"


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTED.format("ext4"))
    return path


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    path = tmp_path / "cache"
    path.mkdir(mode=0o700)
    return path


def found_by(name: str, cache_dir: Path, mounts: Path, free_min_bytes: int = 0) -> Finding:
    return dict(cache_checks(cache_dir, free_min_bytes, mounts=mounts))[name]()


@pytest.mark.parametrize("is_there", [True, False])
def test_fit_disk_is_ok(is_there: bool, cache_dir: Path, mounts: Path) -> None:
    """On this machine's disk each check is ok, whether the folder is there yet or not; nothing is left in it."""
    folder = cache_dir if is_there else cache_dir / "not" / "yet"
    checks = list(cache_checks(folder, 0, mounts=mounts))
    found = [check() for _, check in checks]
    assert [one.check for one in found] == [name for name, _ in checks]
    # How long a sync takes here, and whether RWF_NOWAIT is known, is the machine's matter.
    assert {one.state for one in found if one.check not in ("cache syncs", "cache reads")} == {"ok"}
    assert os.listdir(cache_dir) == []


def test_folder_that_others_read_is_warned_of(cache_dir: Path, mounts: Path) -> None:
    """The cache holds what is in images."""
    cache_dir.chmod(0o755)
    found = found_by("cache folder", cache_dir, mounts)
    assert (found.state, found.advice) == ("warn", f"`chmod 0700 {cache_dir}`")


def test_folder_of_another_user_fails(cache_dir: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon would refuse it too."""
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert found_by("cache folder", cache_dir, mounts).state == "fail"


def test_file_in_the_folders_place_fails(cache_dir: Path, mounts: Path) -> None:
    """What is there and no folder cannot be a cache."""
    (cache_dir / "f").touch()
    assert found_by("cache folder", cache_dir / "f", mounts).state == "fail"


def test_full_disk_is_warned_of(cache_dir: Path, mounts: Path) -> None:
    """Without room nothing is kept, and guests are served all the same."""
    found = found_by("cache space", cache_dir, mounts, free_min_bytes=1 << 62)
    assert (found.state, "cache_free_min" in str(found.advice)) == ("warn", True)


@pytest.mark.parametrize("kind", ["tmpfs", "nfs4", "fuse.sshfs"])
def test_file_system_that_forgets_or_is_far_is_warned_of(kind: str, cache_dir: Path, mounts: Path) -> None:
    """A cache belongs on a local disk; the topmost of several mounts counts."""
    mounts.write_text(MOUNTED.format("ext4") + MOUNTED.format(kind))
    assert found_by("cache file system", cache_dir, mounts).state == "warn"


def test_disk_without_holes_fails(cache_dir: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There each image would take its whole size."""
    whole = os.stat_result((0o600, 1, 1, 1, 0, 0, 1 << 20, 0, 0, 0), {"st_blocks": 4096})
    monkeypatch.setattr(os, "fstat", lambda _fd: whole)
    assert found_by("cache holes", cache_dir, mounts).state == "fail"


@pytest.mark.parametrize(
    ("error", "state"), [(OSError(errno.EOPNOTSUPP, "not supported"), "warn"), (BlockingIOError(), "ok")]
)
def test_reads_at_once_are_tried(
    error: OSError, state: str, cache_dir: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that does not know RWF_NOWAIT costs each read a thread; one that would block knows it."""

    def refused(*_: object) -> int:
        raise error

    monkeypatch.setattr(os, "preadv", refused)
    assert found_by("cache reads", cache_dir, mounts).state == state


def test_slow_sync_is_warned_of(cache_dir: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk whose syncs take longer than a limit is told with what they took."""
    monkeypatch.setattr(cachedisk, "SYNC_SLOW_S", -1.0)
    found = found_by("cache syncs", cache_dir, mounts)
    assert (found.state, "ms for 64 KiB" in found.seen) == ("warn", True)


def test_disk_that_cannot_be_written_fails(
    cache_dir: Path, mounts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only disk is a finding, not a traceback."""

    def read_only(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    found = found_by("cache syncs", cache_dir, mounts)
    assert (found.state, "Read-only" in found.seen) == ("fail", True)


# ── the daemon ──


@pytest.fixture
def control(tmp_path: Path) -> Iterator[Path]:
    """A socket nobody answers on, in a folder of its own."""
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    path = folder / "c.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        yield path


def test_socket_of_the_owner_alone_is_ok(control: Path) -> None:
    """Place and mode are told."""
    found = mounted.socket(control)
    assert (found.state, found.seen) == ("ok", f"{control}, mode 0600")


def test_no_daemon_is_ok(tmp_path: Path) -> None:
    """The doctor runs before the first start."""
    assert [check().state for _, check in daemon_checks(tmp_path / "none")] == ["ok", "ok"]


def test_socket_for_everybody_is_warned_of(control: Path) -> None:
    """Who may use the socket may evict images and read their names."""
    control.chmod(0o666)
    assert mounted.socket(control).state == "warn"


def test_folder_where_others_may_put_a_socket_is_warned_of(control: Path) -> None:
    """Another's socket in this one's place would answer for the daemon; a sticky folder keeps it from that."""
    control.parent.chmod(0o777)
    assert mounted.socket(control).state == "warn"
    control.parent.chmod(0o1777)
    assert mounted.socket(control).state == "ok"


def test_something_else_at_the_sockets_path_fails(tmp_path: Path) -> None:
    """A symlink, to wherever, is no socket."""
    (tmp_path / "f").symlink_to("/dev/null")
    assert mounted.socket(tmp_path / "f").state == "fail"


def test_daemon_that_does_not_answer_is_warned_of(control: Path) -> None:
    """A socket without a daemon behind it is what a crash leaves."""
    found = mounted.daemon(control)
    assert (found.state, "no daemon answers" in found.seen) == ("warn", True)


@pytest.mark.parametrize(
    ("change", "state", "seen"),
    [
        ({}, "ok", "pid 7"),
        ({"version": "0.0.1"}, "warn", f"{__version__} is installed"),
        ({"reads_hung": 3}, "warn", "3 reads hang"),
        ({"requests_stuck": 2}, "warn", "2 requests are stuck"),
        ({"unforeseen_errors": 1}, "warn", "1 requests failed"),
    ],
)
def test_daemon_is_judged_by_its_status(
    change: dict[str, Any], state: str, seen: str, control: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version, hung reads, stuck requests and faults of our own are warned of."""
    status = {"daemon_pid": 7, "version": __version__} | change
    monkeypatch.setattr(ControlClient, "status", lambda _self: status)
    found = mounted.daemon(control)
    assert (found.state, seen in found.seen) == (state, True)


def test_daemon_that_went_away_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a socket and an answer there is no daemon, and nothing wrong with that."""

    def gone(_self: ControlClient) -> dict[str, Any]:
        raise DaemonUnreachable("control socket c: no daemon answers")

    monkeypatch.setattr(ControlClient, "status", gone)
    assert mounted.daemon(tmp_path / "none").state == "ok"
