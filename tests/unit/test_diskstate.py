"""What failures make of the cache's disk, and how it comes back."""

from __future__ import annotations

import errno

import pytest

from lazyimg.core.diskstate import (
    ERRORS_MAX,
    ERRORS_WINDOW_S,
    FAULTS,
    GOOD_PROBES,
    PROBE_PAUSE_MAX_S,
    PROBE_PAUSE_S,
    DiskState,
)


@pytest.fixture
def disk() -> DiskState:
    return DiskState(0)


def fail(disk: DiskState, now_s: float, number: int = errno.EIO) -> None:
    disk.failed(now_s, number, f"error {number}")


def test_good_disk_is_not_probed(disk: DiskState) -> None:
    """A disk without faults is used, and no probe is made of it."""
    assert (disk.state, disk.may_read, disk.may_write, disk.probe_at()) == ("normal", True, True, None)


@pytest.mark.parametrize("number", sorted(FAULTS))
def test_fault_makes_the_disk_unstable(disk: DiskState, number: int) -> None:
    """After its first fault the disk is used on, and probed."""
    fail(disk, 5, number)
    assert (disk.state, disk.since_s, disk.errors_count) == ("unstable", 5, 1)
    assert disk.may_read
    assert disk.may_write
    assert disk.probe_at() == 5 + PROBE_PAUSE_S
    assert disk.last_error == f"error {number}"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EBADF, errno.ESTALE, 0])
def test_other_errors_are_not_the_disks(disk: DiskState, number: int) -> None:
    """A full disk, or a limit of this process, says nothing against the disk, however often it comes."""
    for now_s in range(10):
        fail(disk, now_s, number)
    assert (disk.state, disk.errors_count, disk.last_error) == ("normal", 0, None)


def test_repeated_faults_bypass_the_disk(disk: DiskState) -> None:
    """So many faults within the window end the use of the disk."""
    for now_s in range(ERRORS_MAX):
        assert disk.state != "bypass"
        fail(disk, now_s)
    assert disk.state == "bypass"
    assert not disk.may_read
    assert not disk.may_write


def test_rare_faults_do_not_bypass_the_disk(disk: DiskState) -> None:
    """A few bad sectors, met now and then, leave the disk in use."""
    for at in range(20):
        fail(disk, at * ERRORS_WINDOW_S)
    assert disk.state == "unstable"


def test_hung_operation_bypasses_the_disk_at_once(disk: DiskState) -> None:
    """One operation that hangs is enough."""
    disk.hung(7, "a read takes more than 10 s")
    assert (disk.state, disk.since_s, disk.last_error) == ("bypass", 7, "a read takes more than 10 s")
    disk.hung(8, "another")
    assert disk.since_s == 7


def test_good_probes_lead_back(disk: DiskState) -> None:
    """From bypass the first good probe leads to unstable, and some more in a row to normal."""
    disk.hung(0, "hung")
    now_s = 0.0
    for count in range(1, GOOD_PROBES + 1):
        assert disk.probe_at() == now_s + PROBE_PAUSE_S
        now_s += PROBE_PAUSE_S
        disk.probe_succeeded(now_s)
        assert disk.state == ("normal" if count == GOOD_PROBES else "unstable")
    assert disk.probe_at() is None


def test_fault_between_good_probes_begins_anew(disk: DiskState) -> None:
    """An unstable disk is normal only after good probes in a row."""
    fail(disk, 0)
    for now_s in range(1, 20):
        disk.probe_succeeded(now_s)
        if now_s % 2 and now_s < 10:
            disk.failed(now_s * ERRORS_WINDOW_S, errno.EIO, "again")
        if now_s == GOOD_PROBES + 2:
            assert disk.state == "unstable"
    assert disk.state == "normal"


def test_pauses_between_bad_probes_grow_to_a_limit(disk: DiskState) -> None:
    """[I5] A disk that stays bad is probed ever more rarely, but at least every PROBE_PAUSE_MAX_S."""
    disk.hung(0, "hung")
    pauses = []
    now_s = 0.0
    for _ in range(8):
        at_s = disk.probe_at()
        assert at_s is not None
        pauses.append(at_s - now_s)
        now_s = at_s
        disk.probe_failed(now_s, errno.EIO, "still")
    assert disk.state == "bypass"
    assert pauses[0] == PROBE_PAUSE_S
    assert pauses == sorted(pauses)
    assert pauses[-1] == PROBE_PAUSE_MAX_S


def test_bad_probes_of_an_unstable_disk_bypass_it(disk: DiskState) -> None:
    """Probes are operations like any other: what fails them ends the use of the disk."""
    fail(disk, 0)
    for now_s in range(1, ERRORS_MAX):
        disk.probe_failed(now_s, errno.EIO, "probe")
    assert disk.state == "bypass"


def test_read_only_disk_is_read_and_not_written(disk: DiskState) -> None:
    """EROFS, however often, ends writing and not reading; a good probe ends that."""
    for now_s in range(10):
        fail(disk, now_s, errno.EROFS)
        disk.probe_failed(now_s, errno.EROFS, "read-only")
    assert (disk.state, disk.is_read_only) == ("unstable", True)
    assert disk.may_read
    assert not disk.may_write
    disk.probe_succeeded(11)
    assert disk.may_write


def test_bypassed_disk_that_is_only_read_only_is_read_again(disk: DiskState) -> None:
    """A probe that fails with EROFS shows that the disk answers: reads are tried again."""
    disk.hung(0, "hung")
    disk.probe_failed(1, errno.EROFS, "read-only")
    assert (disk.state, disk.may_read, disk.may_write) == ("unstable", True, False)


def test_late_errors_do_not_count_against_a_disk_that_came_back(disk: DiskState) -> None:
    """What was begun before the bypass and fails during it is not held against the disk afterwards."""
    disk.hung(0, "hung")
    for _ in range(10):
        fail(disk, 1)
    disk.probe_succeeded(2)
    fail(disk, 3)
    assert disk.state == "unstable"
