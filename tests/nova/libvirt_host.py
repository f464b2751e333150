"""A real libvirtd for the tests, as root, with libvirt's defaults: qemu is another user, disks are given to it.

libvirt's folders are fixed when it is built.  It runs therefore in a mount namespace, where they are empty, and in a
pid namespace, with which all that it started ends, guests too.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

from nova_host import SECURE_PATH
from real_mount import children_of, is_running, wait_until

QEMU_USER = "libvirt-qemu"
# Debian's number for it; its packages make the user together with a service, which the tests do not need.
QEMU_ID = 64055
COMMAND_TIMEOUT_S = 120

CONFIG = """
unix_sock_dir = "{folder}"
unix_sock_rw_perms = "0777"
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = "{host_uuid}"
log_outputs = "3:file:{folder}/libvirtd.log"
"""
# No AppArmor in the tests' machines, no virtlogd, and no control group that would be left behind.
QEMU_CONFIG = """
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
"""
# Runs as the namespace's process 1: a shell that waits also collects the guests, which are nobody's children.
# Mounts of other tests go first: their daemons would wait for the copies here.  They may also go by themselves.
# /dev has no kvm: where it is there and of no use, libvirt asks qemu anew what it can at each start of a guest, 7 s.
SCRIPT = """
set -e
for place in $(awk -v own="${1%/*}/" '$3 ~ /^fuse/ && index($2, own) != 1 { print $2 }' /proc/self/mounts); do
    umount --lazy $place || true
done
for place in /run /var/lib /var/log /var/cache /etc/libvirt; do mount -t tmpfs -o mode=755 tmpfs $place; done
for name in passwd group hosts; do mount --bind "$1/$name" /etc/$name; done
cp "$1/qemu.conf" /etc/libvirt
mkdir /run/dev
for name in null zero full random urandom tty ptmx; do cp -a /dev/$name /run/dev; done
umount --lazy /dev
mount -t tmpfs -o mode=755 tmpfs /dev
cp -a /run/dev/* /dev
mkdir /dev/pts
mount -t devpts -o ptmxmode=666 devpts /dev/pts
hostname "$2"
[ -z "$3" ] || mount --rbind "$3" "$4"
libvirtd --config "$1/libvirtd.conf" --pid-file /run/libvirtd.pid &
wait
"""


class VirshFailed(Exception):
    """virsh says why, and libvirt's log what else there was."""


class Libvirt:
    """One libvirtd, which sees what is mounted when it starts."""

    def __init__(self, folder: Path, name: str, instances: Path | None, seen_as: Path | None) -> None:
        folder.mkdir()
        self._folder = folder
        config = CONFIG.format(folder=folder, host_uuid=uuid.uuid4())
        (folder / "libvirtd.conf").write_text(config)
        (folder / "qemu.conf").write_text(QEMU_CONFIG)
        users, groups = Path("/etc/passwd").read_text(), Path("/etc/group").read_text()
        try:
            self.qemu_uid = pwd.getpwnam(QEMU_USER).pw_uid
        except KeyError:
            self.qemu_uid = QEMU_ID
            users += f"{QEMU_USER}:x:{QEMU_ID}:{QEMU_ID}::/:/usr/sbin/nologin\n"
            groups += f"{QEMU_USER}:x:{QEMU_ID}:\n"
        (folder / "passwd").write_text(users)
        (folder / "group").write_text(groups)
        # libvirt looks its host's name up at each start of a guest, which takes as long as DNS does.
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}.example {name}\n")
        with (folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "--propagation", "slave", "sh", "-c", SCRIPT, "sh", folder, name, instances or "", seen_as or ""],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | {"PATH": SECURE_PATH},
            )  # fmt: skip
        self.uri = f"qemu+unix:///system?socket={folder}/libvirt-sock"

    def wait_ready(self) -> None:
        """Return when it takes connections."""

        def answers() -> bool:
            assert self._process.poll() is None, self.log()
            return (self._folder / "libvirt-sock").exists()

        wait_until(answers, "libvirtd's socket")

    def virsh(self, *words: object) -> str:
        """Run a virsh command and return what it printed.  Raises VirshFailed."""
        done = subprocess.run(
            ["virsh", "--quiet", "--connect", self.uri, *map(str, words)],
            capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False,
        )  # fmt: skip
        if done.returncode:
            raise VirshFailed(f"{words}: {done.stdout}{done.stderr}\n{self.log()[-4000:]}")
        return done.stdout.strip()

    def log(self) -> str:
        """Return its warnings and errors."""
        files = (self._folder / "output", self._folder / "libvirtd.log")
        return "".join(file.read_text() for file in files if file.exists())

    def end(self) -> None:
        """Kill it and its guests; return when they are gone."""
        inside = children_of(self._process.pid)
        # Not SIGTERM, which unshare ignores.  Process 1 ends last in its namespace.
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not any(map(is_running, inside)), "the end of libvirtd and its guests")


@contextlib.contextmanager
def libvirtd(
    folder: Path, name: str, instances: Path | None = None, seen_as: Path | None = None
) -> Iterator[Libvirt]:
    """Give a libvirtd of host `name`, which finds the folder `instances`, if given, at the path `seen_as`."""
    libvirt = Libvirt(folder, name, instances, seen_as)
    try:
        libvirt.wait_ready()
        yield libvirt
    finally:
        libvirt.end()
