"""The companion from end to end: disks and instances on images that nobody has downloaded."""

from __future__ import annotations

import io
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pycdlib import PyCdlib
from real_mount import Mount, lazyimg, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _needs_qemu(require: Callable[..., None]) -> None:
    require("qemu-img", "qemu-io")


def qemu(*words: object) -> str:
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def info(disk: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu("qemu-img", "info", "--output=json", disk))
    return found


def make_overlay(mount: Mount, image_id: str, dest: Path, *options: str) -> None:
    result = lazyimg("overlay", "create", image_id, dest, *options, "--control", mount.control)
    assert result.returncode == 0, result.stderr
    assert str(dest) in result.stdout


def qcow2_of(content: bytes, folder: Path, *options: str) -> bytes:
    """Return a qcow2 image with this content."""
    folder.mkdir()
    (folder / "raw").write_bytes(content)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, folder / "raw", folder / "qcow2")
    return (folder / "qcow2").read_bytes()


def test_overlay_on_raw_reads_as_the_image(mounted: Mount, glance: ServedGlance, tmp_path: Path) -> None:
    """[I8] The disk names its base and the base's format, has the size asked for, and reads as the image."""
    image = glance.add(40 * MIB)
    disk, original = tmp_path / "disk", tmp_path / "original"
    make_overlay(mounted, image.id, disk, "--size", "64M")
    found = info(disk)
    assert found["format"] == "qcow2"
    assert found["virtual-size"] == 64 * MIB
    assert found["backing-filename"] == str(mounted.path_of(image))
    assert found["backing-filename-format"] == "raw"
    assert mounted.status_of(image)["fetched_bytes"] < 10 * MIB, "next to nothing was downloaded to make it"
    original.write_bytes(image.content.ljust(64 * MIB, b"\0"))
    assert "identical" in qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk, original)


def test_overlay_on_qcow2_reads_as_the_image(
    make_mount: Callable[..., Mount], glance: ServedGlance, tmp_path: Path
) -> None:
    """[I8] A base shown as qcow2 is named so, its cluster size taken over, and its content that of the image."""
    mounted = make_mount(glance, view="stored")
    content = random.Random(5).randbytes(6 * MIB)
    image = glance.add(qcow2_of(content, tmp_path / "made", "-o", "cluster_size=16k"), "qcow2")
    disk, original = tmp_path / "disk", tmp_path / "original"
    make_overlay(mounted, image.id, disk)
    found = info(disk)
    assert found["backing-filename-format"] == "qcow2"
    assert found["cluster-size"] == 16 << 10
    assert found["virtual-size"] == 6 * MIB
    original.write_bytes(content)
    assert "identical" in qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk, original)


def test_writes_stay_in_the_overlay(mounted: Mount, glance: ServedGlance, tmp_path: Path) -> None:
    """What a guest writes goes to its disk alone: base and a second guest's disk keep the image's bytes."""
    image = glance.add(4 * MIB)
    disks = [tmp_path / "one", tmp_path / "two"]
    for disk in disks:
        make_overlay(mounted, image.id, disk)
    commands = ["write -P 0x5a 1M 128k", "write -P 0xa5 4190208 4096", "read -P 0x5a 1M 128k"]
    words = [word for command in commands for word in ("-c", command)]
    assert "verification failed" not in qemu("qemu-io", "-f", "qcow2", "-t", "none", *words, disks[0])
    original = tmp_path / "original"
    original.write_bytes(image.content)
    assert "identical" in qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", disks[1], original)
    assert mounted.path_of(image).read_bytes() == image.content


def test_overlay_comes_through_the_companion_as_a_use(
    mounted: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """Making a disk notes the use on the base: it is listed from then on, with the time of its use."""
    image = glance.add(2 * MIB)
    make_overlay(mounted, image.id, tmp_path / "disk")
    assert image.base_name in os.listdir(mounted.path)
    age_s = (tmp_path / "disk").stat().st_mtime - mounted.path_of(image).stat().st_mtime
    assert abs(age_s) < 60


def test_instance_with_everything(mounted: Mount, glance: ServedGlance, tmp_path: Path) -> None:
    """Disk, verified kernel and ramdisk named by the image's own properties, and a drive labelled config-2."""
    # The boot sector of a bzImage ends as a partition table's does.
    kernel = glance.add(os.urandom(510) + b"\x55\xaa" + os.urandom(2 * MIB), "aki", container_format="aki")
    ramdisk = glance.add(b"\x1f\x8b" + os.urandom(MIB), "ari", container_format="ari")
    disk = glance.add(3 * MIB, "ami", container_format="ami", kernel_id=kernel.id, ramdisk_id=ramdisk.id)
    drive = tmp_path / "drive"
    (drive / "openstack" / "latest").mkdir(parents=True)
    (drive / "openstack" / "latest" / "meta_data.json").write_text('{"uuid": "x"}')
    folder = tmp_path / "instance"
    result = lazyimg(
        "instance",
        "create",
        folder,
        "--image",
        disk.id,
        "--config-drive",
        drive,
        "--control",
        mounted.control,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(os.listdir(folder)) == ["disk", "disk.config", "kernel", "ramdisk"]
    assert (folder / "kernel").read_bytes() == kernel.content
    assert (folder / "ramdisk").read_bytes() == ramdisk.content
    assert info(folder / "disk")["backing-filename"] == str(mounted.path_of(disk))
    iso = PyCdlib()
    iso.open(str(folder / "disk.config"))
    try:
        assert iso.pvd.volume_identifier.decode().rstrip() == "config-2"
        found = io.BytesIO()
        iso.get_file_from_iso_fp(found, joliet_path="/openstack/latest/meta_data.json")
        assert found.getvalue() == b'{"uuid": "x"}'
    finally:
        iso.close()


def test_instance_whose_kernel_is_missing_leaves_nothing(
    mounted: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """A kernel that Glance does not have is exit code 4, and no file and no folder is left."""
    disk = glance.add(MIB)
    missing = "00000000-0000-4000-8000-000000000000"
    result = lazyimg(
        *("instance", "create", tmp_path / "instance", "--image", disk.id),
        *("--kernel-id", missing, "--control", mounted.control),
    )
    assert result.returncode == 4
    assert missing in result.stderr
    assert os.listdir(tmp_path) == []


def test_overlay_during_an_outage_waits_for_glance(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance], tmp_path: Path
) -> None:
    """A disk on an image that is known here is made while Glance is away, and read once Glance is back."""
    glance = make_glance()
    image = glance.add(4 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    glance.stop()
    disk, original = tmp_path / "disk", tmp_path / "original"
    make_overlay(mount, image.id, disk)
    original.write_bytes(image.content)
    command = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(disk), str(original)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as compare:
        wait_until(lambda: mount.status_of(image)["retries"] > 0, "a failed attempt")
        assert compare.poll() is None, "it waits"
        glance.start()
        output, _ = compare.communicate(timeout=60)
    assert "identical" in output
