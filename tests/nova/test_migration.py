"""docs/nova.md, tried: onto a hypervisor that has instances, between hosts with and without lazyimg, and back."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import assert_reads_as, info, made_as, qemu
from nova_host import NOVA_GID, NOVA_UID, NovaHost
from real_mount import LAZYIMG, Mount, is_mounted
from served_glance import MIB, ServedGlance, ServedImage

pytestmark = pytest.mark.slow

GUIDE = Path(__file__).parents[2] / "docs" / "nova.md"
INSTANCES = "/var/lib/nova/instances"
SIZE = 8 * MIB
MakeHost = Callable[..., tuple[NovaHost, Mount]]


@pytest.fixture
def image(glance: ServedGlance, tmp_path: Path) -> ServedImage:
    """A qcow2 image, number 30."""
    return glance.add(made_as(tmp_path, "qcow2", 30, SIZE), disk_format="qcow2")


def whole_downloads(glance: ServedGlance, image: ServedImage) -> int:
    return sum(one["range"] is None for one in glance.data_requests(image))


def commands(heading: str) -> str:
    """Return the commands that stand under a heading of the guide."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", GUIDE.read_text(), re.M | re.S)
    assert section is not None, heading
    found = re.findall(r"^```sh\n(.*?)^```", section[1], re.M | re.S)
    assert found, f"no commands under {heading}"
    return "".join(found)


def run_guide(heading: str, host: NovaHost, mount: Mount) -> str:
    """Run the guide's commands on a test's hypervisor and return what they print."""
    script = commands(heading).replace(INSTANCES, str(host.instances))
    (host.folder / "mnt").mkdir()
    script = script.replace("/mnt", str(host.folder / "mnt"))
    # The service is not systemd's here.
    script = script.replace("systemctl disable --now lazyimg", f"kill {mount.holder_pid}")
    script = re.sub(
        r"sudo -u nova ", f"setpriv --reuid {NOVA_UID} --regid {NOVA_GID} --clear-groups ", script
    )
    environ = os.environ | {"PATH": f"{Path(LAZYIMG).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120, env=environ
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_instance_from_before_the_mount_reads_right_after_it(
    make_host: MakeHost, glance: ServedGlance, image: ServedImage
) -> None:
    """[I10] Its base, which plain Nova downloaded, is the one it reads, and the next instance's too."""
    host, mount = make_host(start=False)
    disk = host.spawn(image.id) / "disk"
    assert whole_downloads(glance, image) == 1
    base = host.base / image.base_name
    before = base.stat().st_size, base.stat().st_mtime, base.stat().st_uid
    mount.start()
    assert (base.stat().st_size, base.stat().st_mtime, base.stat().st_uid) == before
    requests = len(glance.data_requests(image))
    assert_reads_as(disk, "qcow2", 30, SIZE)
    assert_reads_as(host.spawn(image.id) / "disk", "qcow2", 30, SIZE)
    assert len(glance.data_requests(image)) == requests
    assert mount.stop() == 0
    assert_reads_as(disk, "qcow2", 30, SIZE)


def test_guest_that_runs_while_lazyimg_is_mounted_and_unmounted_reads_on(
    make_host: MakeHost, image: ServedImage
) -> None:
    """It holds the base beneath the mount, which it neither notices nor keeps busy."""
    host, mount = make_host(start=False)
    disk = host.spawn(image.id) / "disk"
    guest = subprocess.Popen(
        ["qemu-io", "-r", "-f", "qcow2", str(disk)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with guest:
        assert guest.stdin is not None
        assert guest.stdout is not None

        def read_first(offset: int) -> None:
            guest.stdin.write(f"read -v {offset} 16\n")  # type: ignore[union-attr]
            guest.stdin.flush()  # type: ignore[union-attr]
            # qemu-io prints the bytes, then a line of how many they were, then of how long it took.
            line = guest.stdout.readline()  # type: ignore[union-attr]
            expected = " ".join(f"{byte:02x}" for byte in made_bytes(offset))
            assert expected in line
            for _ in range(2):
                guest.stdout.readline()  # type: ignore[union-attr]

        read_first(0)
        mount.start()
        read_first(2 * MIB)
        assert mount.stop() == 0
        read_first(4 * MIB)
        guest.stdin.write("quit\n")


def made_bytes(offset: int) -> bytes:
    first = (30 + 1 << 40) + offset // 8
    return first.to_bytes(8, "little") + (first + 1).to_bytes(8, "little")


def test_disk_moves_to_a_host_without_lazyimg(
    make_host: MakeHost, glance: ServedGlance, image: ServedImage
) -> None:
    """Cold migration, resize, evacuation: the other host downloads the base, and the disk reads the same."""
    host, mount = make_host()
    folder = host.spawn(image.id)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 6M 1M", folder / "disk")
    assert whole_downloads(glance, image) == 0
    host.nova.forget(uuid=folder.name, destroy_disks=False)
    assert mount.stop() == 0
    assert not (host.base / image.base_name).exists()
    host.nova.spawn(uuid=folder.name, image_id=image.id)
    assert whole_downloads(glance, image) == 1
    said = qemu("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x5a 6M 1M", folder / "disk")
    assert "Pattern verification failed" not in said
    qemu("qemu-io", "-f", "qcow2", "-c", "write -z 6M 1M", folder / "disk")
    # And from there to a host with lazyimg: its base is then the real file that was downloaded, or a lazy one.
    (host.base / image.base_name).unlink()
    mount.start()
    said = qemu("qemu-io", "-r", "-f", "qcow2", "-c", "read -v 0 16", folder / "disk")
    assert " ".join(f"{byte:02x}" for byte in made_bytes(0)) in said


def test_live_migration_target_with_lazyimg_downloads_nothing(
    make_host: MakeHost, host: NovaHost, glance: ServedGlance, image: ServedImage
) -> None:
    """From a plain host to one with lazyimg: the same disk on a lazy base, ready for libvirt's copy."""
    source, _ = make_host(start=False)
    folder = source.spawn(image.id, root_gb=1)
    assert whole_downloads(glance, image) == 1
    disk_info = source.nova.disk_info(uuid=folder.name)
    host.nova.prepare_live_migration(uuid=folder.name, image_id=image.id, disk_info=disk_info)
    assert whole_downloads(glance, image) == 1
    target = host.instances / folder.name / "disk"
    ours, theirs = info(target), info(folder / "disk")
    for name in ("backing-filename", "full-backing-filename"):
        assert ours.pop(name).removeprefix(str(host.folder)) == theirs.pop(name).removeprefix(
            str(source.folder)
        )
    assert ours == theirs
    assert_reads_as(target, "qcow2", 30, SIZE)


def test_live_migration_target_without_lazyimg_downloads_its_base(
    make_host: MakeHost, host: NovaHost, glance: ServedGlance, image: ServedImage
) -> None:
    """From a host with lazyimg to a plain one, which does as it always did."""
    folder = host.spawn(image.id, root_gb=1)
    target, _ = make_host(start=False)
    target.nova.prepare_live_migration(
        uuid=folder.name, image_id=image.id, disk_info=host.nova.disk_info(uuid=folder.name)
    )
    assert whole_downloads(glance, image) == 1
    assert_reads_as(target.instances / folder.name / "disk", "qcow2", 30, SIZE)


def test_way_back_leaves_plain_files(make_host: MakeHost, glance: ServedGlance, image: ServedImage) -> None:
    """The guide's commands make real files of the lazy images in use, as Nova's own, and end lazyimg."""
    host, mount = make_host()
    disk = host.spawn(image.id, ephemeral_gb=1) / "disk"
    run_guide("How to go back", host, mount)
    assert mount.wait_ended() == 0
    assert not is_mounted(mount.path)
    base = host.base / image.base_name
    assert (base.stat().st_uid, base.stat().st_gid) == (NOVA_UID, NOVA_GID)
    assert base.stat().st_blocks * 512 < base.stat().st_size, "holes stay holes"
    assert_reads_as(disk, "qcow2", 30, SIZE)
    requests = len(glance.data_requests(image))
    assert_reads_as(host.instances / host.spawn(image.id).name / "disk", "qcow2", 30, SIZE)
    assert len(glance.data_requests(image)) == requests
    host.nova.manage_image_cache()
    assert base.exists()


def test_bases_that_are_real_are_found_as_the_guide_says(
    make_host: MakeHost, image: ServedImage, glance: ServedGlance
) -> None:
    """The folder beneath the mount shows which bases are plain files."""
    host, mount = make_host(start=False)
    host.spawn(image.id)
    mount.start()
    lazy = glance.add(8 * MIB)
    host.spawn(lazy.id)
    shown = run_guide("Which bases are lazy", host, mount).split()
    assert shown == [lazy.base_name]
