"""Unmodified Nova starts instances on the mount: nothing is downloaded, every disk is what it should be."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from disks import assert_reads_as, info, made_as
from nova_host import NOVA_GID, NOVA_UID, NovaHost
from real_mount import Mount, lazyimg
from served_glance import MIB, ServedGlance, ServedImage, pattern

pytestmark = pytest.mark.slow

GIB = 1 << 30


def whole_downloads(glance: ServedGlance, image: ServedImage) -> int:
    """Count the requests for all of an image: Nova's, for lazyimg asks for ranges."""
    return sum(one["range"] is None for one in glance.data_requests(image))


def owner(path: Path) -> tuple[int, int]:
    return path.stat().st_uid, path.stat().st_gid


def test_nova_is_not_root_and_reads_past_the_page_cache(host: NovaHost) -> None:
    """Nova runs as its own user, and finds that guests can read the instances folder with cache=none."""
    assert host.nova.facts() == {"uid": NOVA_UID, "gid": NOVA_GID, "disk_cachemode": "none"}


@pytest.mark.parametrize("options", [(), ("-c",), ("-o", "cluster_size=4096")])
def test_qcow2_image_starts_without_a_download(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """[I8] The disk names the lazy base and its format, is as large as the flavor, and reads as the image."""
    image = glance.add(made_as(tmp_path, "qcow2", 1, 24 * MIB, *options), disk_format="qcow2")
    disk = host.spawn(image.id, root_gb=1) / "disk"
    made = info(disk)
    assert made["backing-filename"] == str(host.base / image.base_name)
    assert made["backing-filename-format"] == "raw"
    assert made["virtual-size"] == GIB
    assert whole_downloads(glance, image) == 0
    assert mount.status_of(image)["fetched_bytes"] < len(image.content), "next to nothing is needed to start"
    assert owner(disk) == (NOVA_UID, NOVA_GID)
    assert_reads_as(disk, "qcow2", 1, 24 * MIB)
    assert whole_downloads(glance, image) == 0


@pytest.mark.parametrize("disk_format", ["raw", "iso"])
def test_image_shown_as_it_is_starts_without_a_download(
    host: NovaHost, glance: ServedGlance, disk_format: str
) -> None:
    """A raw image, and an ISO, whose flavor has no root disk size: the disk is as large as the image."""
    content = bytearray(pattern(2, 8 * MIB))
    # ECMA-119: what makes it an ISO 9660 volume.
    content[0x8000:0x8006] = b"\x01CD001" if disk_format == "iso" else content[0x8000:0x8006]
    image = glance.add(bytes(content), disk_format=disk_format)
    folder = host.spawn(image.id)
    assert whole_downloads(glance, image) == 0
    assert info(folder / "disk")["virtual-size"] == len(content)
    (folder / "original").write_bytes(content)
    said = subprocess.run(
        ["qemu-img", "compare", "-f", "qcow2", folder / "disk", folder / "original"], capture_output=True
    )
    assert said.returncode == 0, said.stdout


def test_kernel_and_ramdisk_come_from_the_mount(host: NovaHost, glance: ServedGlance) -> None:
    """Nova copies them out of `_base`, where they are as lazy as any image."""
    kernel = glance.add(3 * MIB + 17, disk_format="aki", container_format="aki")
    ramdisk = glance.add(2 * MIB + 5, disk_format="ari", container_format="ari")
    root = glance.add(8 * MIB)
    folder = host.spawn(root.id, kernel_id=kernel.id, ramdisk_id=ramdisk.id)
    assert (folder / "kernel").read_bytes() == kernel.content
    assert (folder / "ramdisk").read_bytes() == ramdisk.content
    assert whole_downloads(glance, kernel) == whole_downloads(glance, ramdisk) == 0


def test_ephemeral_disk_and_swap_are_made_in_the_upper_folder(host: NovaHost, glance: ServedGlance) -> None:
    """mkfs and mkswap work through the mount, on files that are Nova's from the start, and guests get overlays."""
    folder = host.spawn(glance.add(8 * MIB).id, ephemeral_gb=1, swap_mb=16)
    (ephemeral,) = host.base.glob("ephemeral_1_*")
    swap = host.base / "swap_16"
    for base, size_bytes, kind in ((ephemeral, GIB, "ext4"), (swap, 16 * MIB, "swap")):
        assert owner(base) == (NOVA_UID, NOVA_GID)
        assert base.stat().st_size == size_bytes
        found = subprocess.run(
            ["blkid", "-p", "-o", "value", "-s", "TYPE", base], capture_output=True, text=True
        )
        assert found.stdout.strip() == kind
    assert ephemeral.stat().st_blocks * 512 < GIB // 4, "made sparse, and so it stays"
    assert info(folder / "disk.eph0")["backing-filename"] == str(ephemeral)
    assert info(folder / "disk.swap")["backing-filename"] == str(swap)


def test_two_instances_share_a_base(host: NovaHost, glance: ServedGlance, tmp_path: Path) -> None:
    """What the second one reads is there already."""
    image = glance.add(made_as(tmp_path, "qcow2", 3, 8 * MIB), disk_format="qcow2")
    first = host.spawn(image.id) / "disk"
    assert_reads_as(first, "qcow2", 3, 8 * MIB)
    requests = len(glance.data_requests(image))
    second = host.spawn(image.id) / "disk"
    assert_reads_as(second, "qcow2", 3, 8 * MIB)
    assert len(glance.data_requests(image)) == requests


def test_guest_definition_names_the_overlay_and_cache_none(host: NovaHost, glance: ServedGlance) -> None:
    """The domain that libvirt gets is plain Nova's: qcow2, cache none, the overlay and no word of the base."""
    folder = host.instances / "4b50b2b0-0d0e-4d58-a1fb-5c6e8bbf7a3f"
    xml = host.nova.spawn(uuid=folder.name, image_id=glance.add(8 * MIB).id)
    assert '<driver name="qemu" type="qcow2" cache="none"' in xml
    assert f'<source file="{folder}/disk"' in xml
    assert "_base" not in xml


def test_nova_and_companion_make_the_same_disk(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """Option by option: format, version, cluster size, base, base's format, size and features."""
    image = glance.add(made_as(tmp_path, "qcow2", 4, 8 * MIB), disk_format="qcow2")
    novas = host.spawn(image.id, root_gb=1) / "disk"
    ours = tmp_path / "disk"
    done = lazyimg("overlay", "create", image.id, ours, "--size", "1G", "--control", mount.control)
    assert done.returncode == 0, done.stderr
    assert info(ours) == info(novas)
    assert host.nova.image_info(path=str(novas))["backing"] == str(host.base / image.base_name)


def test_use_of_a_base_is_noted_and_stays_noted(host: NovaHost, mount: Mount, glance: ServedGlance) -> None:
    """Nova's utime, as root through its helper, sets the base's mtime; a restart of the daemon keeps it."""
    image = glance.add(8 * MIB)
    base = mount.path_of(image)
    os.utime(base, (1_000_000_000, 1_000_000_000))
    assert base.stat().st_mtime == 1_000_000_000
    host.spawn(image.id)
    noted_ns = base.stat().st_mtime_ns
    assert noted_ns > 1_700_000_000 * 10**9
    mount.kill_daemon()
    assert base.stat().st_mtime_ns == noted_ns
    assert any("privsep-helper" in command for command in host.root.commands)
