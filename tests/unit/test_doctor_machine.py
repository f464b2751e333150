"""The doctor's look at a machine: a folder stands for /, scripts for its programs."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lazyimg.doctor import machine as look
from lazyimg.doctor.finding import Finding
from lazyimg.doctor.machine import Machine, machine_checks

MOUNTPOINT = Path("/var/lib/nova/instances/_base")
Change = Callable[[Machine], Machine]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine on which all is well, for a user who is not root."""
    root, programs = tmp_path / "root", tmp_path / "bin"
    for name, text in {
        "dev/fuse": "",
        "etc/fuse.conf": "# user_allow_other\nuser_allow_other\n",
        "proc/mounts": "none /sys/fs/fuse/connections fusectl rw 0 0\n",
        "proc/self/mountinfo": "22 1 8:1 / / rw shared:1 - ext4 /dev/sda rw\n",
    }.items():
        put(root / name, text)
    put(programs / "fusermount3", "#!/bin/sh\necho fusermount3 version: 3.14.0\n", mode=0o4755)
    put(programs / "qemu-img", "#!/bin/sh\necho 'qemu-img version 7.2.9 (Debian)'\n", mode=0o755)
    return Machine(root, "6.12.0-amd64", str(programs), is_root=False, descriptors_max=1 << 20)


def put(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def test_fit_machine_is_ok(machine: Machine) -> None:
    """Where all is there each check is ok, has its name, says what it saw, and gives no advice."""
    checks = list(machine_checks(machine, allow_other=True, mountpoint=MOUNTPOINT))
    found = [check() for _, check in checks]
    assert [one.check for one in found] == [name for name, _ in checks]
    assert {(one.state, one.advice) for one in found} == {("ok", None)}
    seen = {one.check: one.seen for one in found}
    assert seen["fusermount3"].endswith("/bin/fusermount3 3.14.0")
    assert seen["qemu-img"].endswith("/bin/qemu-img 7.2.9")


# ── what can be wrong ──


def release(text: str) -> Change:
    return lambda machine: replace(machine, release=text)


def as_root(change: Change) -> Change:
    return lambda machine: replace(change(machine), is_root=True)


def limit(descriptors: int) -> Change:
    return lambda machine: replace(machine, descriptors_max=descriptors)


def without(name: str) -> Change:
    def change(machine: Machine) -> Machine:
        (machine.root / name).unlink()
        return machine

    return change


def having(name: str, text: str) -> Change:
    def change(machine: Machine) -> Machine:
        put(machine.root / name, text)
        return machine

    return change


def lacking(program: str) -> Change:
    def change(machine: Machine) -> Machine:
        Path(machine.path, program).unlink()
        return machine

    return change


def not_setuid(machine: Machine) -> Machine:
    Path(machine.path, "fusermount3").chmod(0o755)
    return machine


def enforcing(boolean: str) -> Change:
    def change(machine: Machine) -> Machine:
        put(machine.root / "sys/fs/selinux/enforce", "1")
        put(machine.root / "sys/fs/selinux/booleans/virt_use_fusefs", boolean)
        return machine

    return change


PRIVATE = "22 1 8:1 / / rw - ext4 a rw\n"
SHARED = "23 22 8:2 / /var/lib rw shared:7 - xfs b rw\n"
OURS = f"24 23 0:50 / {MOUNTPOINT} rw - fuse.lazyimg lazyimg rw\n"


def propagation(machine: Machine) -> Finding:
    return look.propagation(machine, MOUNTPOINT)


@pytest.mark.parametrize(
    ("change", "check", "state", "advice"),
    [
        (release("6.1.0-25-amd64"), look.kernel, "warn", "6.9"),
        (without("dev/fuse"), look.fuse_device, "fail", "modprobe fuse"),
        (lacking("fusermount3"), look.fusermount, "fail", "package fuse3"),
        (not_setuid, look.fusermount, "fail", "chmod u+s"),
        (as_root(not_setuid), look.fusermount, "ok", None),
        (without("etc/fuse.conf"), look.allow_others, "fail", "allow_other = false"),
        (having("etc/fuse.conf", "#user_allow_other\n"), look.allow_others, "fail", "add that line"),
        (as_root(without("etc/fuse.conf")), look.allow_others, "ok", None),
        (having("proc/mounts", "proc /proc proc rw 0 0\n"), look.fusectl, "warn", "mount -t fusectl"),
        (lacking("qemu-img"), look.qemu_img, "warn", "qemu-utils"),
        (limit(1024), look.descriptors, "warn", "LimitNOFILE"),
        (limit(resource.RLIM_INFINITY), look.descriptors, "ok", None),
        (enforcing("0 0"), look.confinement, "fail", "setsebool"),
        (enforcing("1 1"), look.confinement, "ok", None),
        (having("sys/module/apparmor/parameters/enabled", "Y\n"), look.confinement, "ok", None),
        (having("proc/self/mountinfo", PRIVATE), propagation, "warn", "--make-rshared /`"),
        (having("proc/self/mountinfo", PRIVATE + SHARED + OURS), propagation, "ok", None),
    ],
)
def test_what_is_wrong_is_found(
    change: Change, check: Callable[[Machine], Finding], state: str, advice: str | None, machine: Machine
) -> None:
    """Each fault has its state and says what to do; what is well has no advice."""
    found = check(change(machine))
    assert found.state == state
    assert found.advice is None if advice is None else advice in (found.advice or "")


def test_device_that_does_not_open_fails(machine: Machine) -> None:
    """/dev/fuse that is there and does not open names the reason."""
    (machine.root / "dev/fuse").unlink()
    (machine.root / "dev/fuse").mkdir()
    found = look.fuse_device(machine)
    assert (found.state, "Is a directory" in found.seen) == ("fail", True)


def test_program_that_does_not_answer_is_left(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5] A program is waited for no longer than a limit."""
    monkeypatch.setattr(look, "PROGRAM_TIMEOUT_S", 0.1)
    put(Path(machine.path, "qemu-img"), "#!/bin/sh\nexec /bin/sleep 60\n", mode=0o755)
    assert "does not answer" in look.qemu_img(machine).seen


def test_this_machine_is_what_runs_the_test() -> None:
    """The defaults are those of this process."""
    here = Machine.this()
    assert (here.root, here.release, here.is_root) == (Path("/"), os.uname().release, os.geteuid() == 0)
