"""Nova on a real libvirtd and a real mount: guests start, are copied and moved, and their bases stay as they are."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from disks import as_raw, downloaded, info, made_as, qemu
from kernel_marks import needs_resend
from libvirt_host import Libvirt, VirshFailed, libvirtd
from mount_fixtures import _watchdog, guest  # noqa: F401  (used by name)
from nova_host import NOVA_GID, NOVA_UID, NovaHost, nova_host
from real_mount import Mount, Mounts, mounts, wait_until
from served_glance import MIB, ServedGlance, pattern

from lazyimg.demo.guest import Guest
from lazyimg.demo.ramdisk import write_ramdisk

pytestmark = pytest.mark.slow

SIZE = 2 * MIB
NUMBER = 40
WRITTEN_AT, WRITTEN = MIB + 512, b"the guest was here"
TARGET = "127.0.0.1"
# To boot or to be moved, on a machine that may be doing much else.
GUEST_TIMEOUT_S = 120
# Where libvirt is, and a plain CPU: emulated (qemu 7.2), a guest on the one that libvirt finds best crashed after its
# live migration wherever the machine was busy.  All else is as Nova has it.
NOVA_CONFIG = """
[libvirt]
connection_uri = qemu+unix:///system?socket={folder}/libvirt-source/libvirt-sock
cpu_mode = none
live_migration_uri = qemu+unix:///system?socket={folder}/libvirt-%s/libvirt-sock
[vnc]
enabled = false
"""
# Reads all of its disk again and again, past its own cache, and says what it read.  The pause leaves a processor to
# others.
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in /modules/*; do /bin/busybox insmod $module; done
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
exec > /dev/ttyS0 2>&1
printf '{WRITTEN.decode()}' | /bin/busybox dd of=/dev/vda bs=1 seek={WRITTEN_AT} conv=notrunc,fsync
while :; do
    echo 3 > /proc/sys/vm/drop_caches
    echo "disk-is $(/bin/busybox sha256sum /dev/vda | /bin/busybox cut -c 1-64)"
    /bin/busybox usleep 200000
done
"""


def image_bytes(number: int) -> bytes:
    """What an image of `made_as` reads as."""
    return pattern(number, SIZE) + bytes(SIZE)


def guest_bytes() -> bytes:
    """What the disk of the guest reads as once it has written."""
    disk = bytearray(image_bytes(NUMBER))
    disk[WRITTEN_AT : WRITTEN_AT + len(WRITTEN)] = WRITTEN
    return bytes(disk)


@dataclass(frozen=True)
class Hypervisor:
    """A host with Nova, libvirt and lazyimg, and a second mount, which has the stored view."""

    host: NovaHost
    libvirt: Libvirt
    mount: Mount
    stored: Mount
    made: Mounts

    def boot(self, glance: ServedGlance, folder: Path, guest: Guest) -> Path:  # noqa: F811
        """Start the guest that reads its disk by Nova, and return its folder once it has read all of it."""
        own = folder / "own-ramdisk"
        write_ramdisk(own, {"init": INIT.encode()}, folders=())
        # The kernel unpacks one archive after the other, so that this init takes the place of the first one's.
        ramdisk = glance.add(guest.ramdisk.read_bytes() + own.read_bytes(), "ari", container_format="ari")
        kernel = glance.add(guest.kernel.read_bytes(), "aki", container_format="aki")
        disk = glance.add(made_as(folder, "qcow2", NUMBER, SIZE), disk_format="qcow2")
        instance = self.host.spawn(disk.id, memory_mb=192, kernel_id=kernel.id, ramdisk_id=ramdisk.id)
        wait_readings(instance, 1)
        return instance


def readings(instance: Path) -> list[str]:
    """Return the sum of the disk as the guest read it, for each time it did."""
    found: list[str] = re.findall(r"disk-is ([0-9a-f]{64})", (instance / "console.log").read_text())
    return found


def wait_readings(instance: Path, count: int) -> None:
    """The guest reads all of its disk so many times more, and each time what it should."""
    before = len(readings(instance))
    # Of one that is under way the beginning may have been read earlier.
    try:
        wait_until(lambda: len(readings(instance)) > before + count, "what the guest reads", GUEST_TIMEOUT_S)
    except AssertionError as exc:
        console = (instance / "console.log").read_text(errors="replace")
        raise AssertionError(f"{exc}; its console ends:\n{console[-3000:]}") from exc
    assert set(readings(instance)) == {hashlib.sha256(guest_bytes()).hexdigest()}


@pytest.fixture(scope="module")
def hypervisor(
    real_nova: None, require: Callable[..., None], _shared_glance: ServedGlance
) -> Iterator[Hypervisor]:
    """Nova's default settings, lazyimg on its `_base`, and libvirt as root with its defaults."""
    require("libvirtd", "virsh", "unshare")
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(nova_host(_shared_glance.url, NOVA_CONFIG))
        try:
            host.provide_libvirt_binding()
        except subprocess.CalledProcessError:
            pytest.skip("python3-libvirt is missing here; `make setup` installs it")
        made = stack.enter_context(mounts())
        mount = made.make(
            host.instances,
            _shared_glance.url,
            cache_dir=host.folder / "cache",
            control=host.folder / "c.sock",
            view="raw",
        )
        stored = made.make(host.folder / "stored", _shared_glance.url, view="stored")
        libvirt = stack.enter_context(libvirtd(host.folder / "libvirt-source", "source"))
        yield Hypervisor(host, libvirt, mount, stored, made)


@pytest.fixture(autouse=True)
def _watched(hypervisor: Hypervisor) -> Iterator[None]:
    with _watchdog(hypervisor.made):
        yield


@pytest.fixture(scope="module")
def running(
    hypervisor: Hypervisor,
    _shared_glance: ServedGlance,
    guest: Guest,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Path]:
    """The folder of an instance whose guest reads its disk."""
    instance = hypervisor.boot(_shared_glance, tmp_path_factory.mktemp("guest"), guest)
    yield instance
    hypervisor.host.nova.forget(uuid=instance.name)


def owner_and_mode(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, found.st_mode


@needs_resend
def test_guest_reads_on_when_the_daemon_is_killed(hypervisor: Hypervisor, running: Path) -> None:
    """[I9] SIGKILL while the domain runs: neither the guest nor libvirt knows of an error.

    Expected: the next daemon takes over, the guest reads its disk right, the domain runs, virsh domblkerror says none.
    """
    hypervisor.mount.new_daemon(hypervisor.mount.kill_daemon())
    wait_readings(running, 1)
    virsh = hypervisor.libvirt.virsh
    assert virsh("domstate", running.name) == "running"
    assert virsh("domblkerror", running.name) == "No errors found"


def test_live_snapshot_is_the_disk_of_the_running_guest(
    hypervisor: Hypervisor, glance: ServedGlance, running: Path, tmp_path: Path
) -> None:
    """Nova lets libvirt copy the running guest's disk beside it, merges it with the lazy base, and uploads it.

    Expected: the image has the guest's own write and all of the base; the guest reads on.
    """
    snapshot = hypervisor.host.nova.live_snapshot(uuid=running.name)
    (tmp_path / "snapshot").write_bytes(downloaded(glance, snapshot))
    assert as_raw(tmp_path / "snapshot", tmp_path / "raw") == guest_bytes()
    wait_readings(running, 1)
    assert hypervisor.libvirt.virsh("domstate", running.name) == "running"


def test_chown_of_the_chain_leaves_the_lazy_base_as_it_is(
    hypervisor: Hypervisor, glance: ServedGlance, tmp_path: Path
) -> None:
    """libvirt gives overlay and base to qemu's user: EPERM for the base, which it tolerates, and the guest starts.

    Expected: the overlay is qemu's while the guest runs and Nova's after, which makes a cold snapshot of it; the base
    is Nova's all the time; libvirt's log names no trouble with it.
    """
    image = glance.add(made_as(tmp_path, "qcow2", NUMBER + 1, SIZE), disk_format="qcow2")
    base = hypervisor.mount.path_of(image)
    before = owner_and_mode(base)
    assert before[:2] == (NOVA_UID, NOVA_GID)
    instance = hypervisor.host.spawn(image.id)
    assert (instance / "disk").stat().st_uid == hypervisor.libvirt.qemu_uid
    assert hypervisor.libvirt.qemu_uid != NOVA_UID
    assert owner_and_mode(base) == before
    snapshot = hypervisor.host.nova.snapshot(uuid=instance.name)
    assert (instance / "disk").stat().st_uid == NOVA_UID
    assert owner_and_mode(base) == before
    (tmp_path / "snapshot").write_bytes(downloaded(glance, snapshot))
    assert as_raw(tmp_path / "snapshot", tmp_path / "raw") == image_bytes(NUMBER + 1)
    hypervisor.host.nova.forget(uuid=instance.name)
    assert image.base_name not in hypervisor.libvirt.log()


@pytest.fixture(scope="module")
def domain_xml(
    hypervisor: Hypervisor, _shared_glance: ServedGlance, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """What Nova tells libvirt of an instance."""
    content = made_as(tmp_path_factory.mktemp("xml"), "qcow2", NUMBER + 2, SIZE)
    instance = hypervisor.host.spawn(_shared_glance.add(content, disk_format="qcow2").id)
    xml = hypervisor.libvirt.virsh("dumpxml", "--inactive", instance.name)
    hypervisor.host.nova.forget(uuid=instance.name)
    return xml


@pytest.mark.parametrize(
    ("shown", "options"),
    [
        ("raw", {"cache": "none"}),
        ("qcow2 as raw", {"cache": "none", "io": "native"}),
        ("qcow2 as raw", {"cache": "writeback"}),
        ("qcow2 as stored", {"cache": "none", "io": "native"}),
    ],
)
def test_running_disk_is_copied_pulled_and_committed(
    hypervisor: Hypervisor,
    glance: ServedGlance,
    domain_xml: str,
    tmp_path: Path,
    shown: str,
    options: dict[str, str],
) -> None:
    """Nova's domain on each kind of base, with each cache mode: libvirt's block jobs read the image's bytes.

    Expected: a block copy is the image; a commit into the base is refused and leaves it as it is; a snapshot committed
    and the base pulled into the overlay leave a disk without a backing file that is the image too.
    """
    number = NUMBER + 3
    if shown == "raw":
        image = glance.add(image_bytes(number))
    else:
        image = glance.add(made_as(tmp_path, "qcow2", number, SIZE), disk_format="qcow2")
    mount = hypervisor.stored if shown == "qcow2 as stored" else hypervisor.mount
    base_format = "qcow2" if shown == "qcow2 as stored" else "raw"
    name = str(uuid.uuid4())
    folder = hypervisor.host.instances / name
    folder.mkdir()
    disk, copy = folder / "disk", folder / "copy"
    qemu("qemu-img", "create", "-f", "qcow2", "-F", base_format, "-b", mount.path_of(image), disk)
    (tmp_path / "xml").write_text(variant(domain_xml, name, disk, options))
    before = owner_and_mode(mount.path_of(image))
    virsh = hypervisor.libvirt.virsh
    virsh("create", "--paused", tmp_path / "xml")
    try:
        read_before = mount.status_of(image)["present_bytes"]
        virsh("blockcopy", name, "vda", copy, "--format", "qcow2", "--transient-job", "--wait", "--finish")
        assert mount.status_of(image)["present_bytes"] > read_before
        virsh(
            "snapshot-create-as",
            name,
            "--disk-only",
            "--no-metadata",
            "--diskspec",
            f"vda,file={folder}/above",
        )
        virsh("blockcommit", name, "vda", "--shallow", "--active", "--pivot", "--wait")
        # Into the base itself.
        with pytest.raises(VirshFailed, match="Permission denied"):
            virsh("blockcommit", name, "vda", "--active", "--pivot", "--wait")
        assert owner_and_mode(mount.path_of(image)) == before
        virsh("blockpull", name, "vda", "--wait")
        assert virsh("domblkerror", name) == "No errors found"
    finally:
        virsh("destroy", name)
    for one in (disk, copy):
        assert "backing-filename" not in info(one)
        assert as_raw(one, tmp_path / one.name) == image_bytes(number)


def variant(xml: str, name: str, disk: Path, options: dict[str, str]) -> str:
    """Return a domain's XML with another name, another disk and other options of its driver."""
    domain = ElementTree.fromstring(xml)
    for tag in ("name", "uuid"):
        domain.find(tag).text = name  # type: ignore[union-attr]
    domain.find("sysinfo/system/entry[@name='uuid']").text = name  # type: ignore[union-attr]
    old = domain.find("devices/disk/source").get("file")  # type: ignore[union-attr]
    domain.find("devices/disk/driver").attrib.update(options)  # type: ignore[union-attr]
    return ElementTree.tostring(domain, "unicode").replace(str(Path(str(old)).parent), str(disk.parent))


def test_live_migration_copies_the_overlay_and_no_base(
    hypervisor: Hypervisor,
    glance: ServedGlance,
    guest: Guest,  # noqa: F811
    tmp_path: Path,
) -> None:
    """From one libvirtd to another by Nova's own call, each host with a mount of its own at the same path; paused.

    Expected: the guest reads on at the target, through the target's mount; what was copied is the overlay alone.
    """
    source, host = hypervisor.libvirt, hypervisor.host
    instance = hypervisor.boot(glance, tmp_path, guest)
    instances = host.folder / "target"
    there = instances / instance.name
    there.mkdir(parents=True)
    with mounts() as made, _watchdog(made):
        mount = made.make(
            instances, glance.url, cache_dir=host.folder / "cache-of-target", control=host.folder / "t.sock"
        )
        base = mount.path / Path(info(instance / "disk")["backing-filename"]).name
        target_disk = there / "disk"
        for name in ("kernel", "ramdisk"):
            shutil.copy(instance / name, there)
        # The base by the name that it has on both hosts.
        size = info(instance / "disk")["virtual-size"]
        backing = host.base / base.name
        qemu("qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", backing, target_disk, size)
        with libvirtd(host.folder / f"libvirt-{TARGET}", "target", instances, host.instances) as target:
            # Emulated, one that runs meanwhile may arrive with memory older than its registers: on a busy machine it
            # was found idling with another process's name, and stuck.
            source.virsh("suspend", instance.name)
            host.nova.live_migrate(uuid=instance.name, target=TARGET)
            assert instance.name not in source.virsh("list", "--all", "--uuid")
            target.virsh("resume", instance.name)
            assert target.virsh("domstate", instance.name) == "running"
            wait_readings(there, 1)
            assert target.virsh("domblkerror", instance.name) == "No errors found"
            assert mount.status()["images"][0]["present_bytes"] >= SIZE
        assert target_disk.stat().st_blocks * 512 < SIZE / 2
        qemu("qemu-img", "rebase", "-u", "-F", "raw", "-b", base, target_disk)
        assert as_raw(target_disk, tmp_path / "raw") == guest_bytes()
    shutil.rmtree(instances)
