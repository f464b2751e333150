"""Snapshot, shelving and its end on the mount, by Nova itself: what reads a whole disk reads it right."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from disks import as_raw, downloaded, info, made_as, qemu
from nova_host import NovaHost
from real_mount import Mount
from served_glance import MIB, ServedGlance, ServedImage

pytestmark = pytest.mark.slow


@pytest.fixture
def image(glance: ServedGlance, tmp_path: Path) -> ServedImage:
    """A qcow2 image."""
    return glance.add(made_as(tmp_path, "qcow2", 20, 12 * MIB), disk_format="qcow2")


def guest_writes(disk: Path) -> None:
    """Change a part of a disk, as its guest would."""
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 0x5a 1M 2M", disk)


def assert_all_ranges(glance: ServedGlance, image_id: str) -> None:
    asked = [one for one in glance.requests() if one["path"].endswith(f"{image_id}/file")]
    assert all(one["range"] for one in asked if one["method"] == "GET")


def test_cold_snapshot_is_the_disk(
    host: NovaHost, glance: ServedGlance, image: ServedImage, tmp_path: Path
) -> None:
    """Nova's convert reads the image through the mount and uploads it with the guest's own writes in it."""
    folder = host.spawn(image.id)
    guest_writes(folder / "disk")
    disk = as_raw(folder / "disk", tmp_path / "disk")
    assert disk[MIB : 3 * MIB] == b"\x5a" * (2 * MIB)
    snapshot = host.nova.snapshot(uuid=folder.name)
    (tmp_path / "snapshot").write_bytes(downloaded(glance, snapshot))
    assert info(tmp_path / "snapshot").get("backing-filename") is None
    assert as_raw(tmp_path / "snapshot", tmp_path / "snapshot.raw") == disk
    assert_all_ranges(glance, image.id)


def test_unshelved_disk_is_rebased_onto_the_image(
    host: NovaHost, mount: Mount, glance: ServedGlance, image: ServedImage, tmp_path: Path
) -> None:
    """Started from its shelving's image and rebased onto the first one by Nova, both of them lazy."""
    folder = host.spawn(image.id)
    guest_writes(folder / "disk")
    disk = as_raw(folder / "disk", tmp_path / "disk")
    snapshot = host.nova.snapshot(uuid=folder.name)
    host.nova.forget(uuid=folder.name)
    unshelved = host.instances / str(uuid.uuid4())
    host.nova.unshelve(uuid=unshelved.name, snapshot_id=snapshot, image_id=image.id)
    assert info(unshelved / "disk")["backing-filename"] == str(mount.path_of(image))
    assert as_raw(unshelved / "disk", tmp_path / "unshelved") == disk


def test_instance_of_a_snapshot_starts_without_a_download(
    host: NovaHost, glance: ServedGlance, image: ServedImage, tmp_path: Path
) -> None:
    """An image uploaded a moment ago is found at once, and is as lazy as any."""
    folder = host.spawn(image.id)
    guest_writes(folder / "disk")
    snapshot = host.nova.snapshot(uuid=folder.name)
    copy = host.spawn(snapshot)
    assert as_raw(copy / "disk", tmp_path / "copy") == as_raw(folder / "disk", tmp_path / "disk")
    assert_all_ranges(glance, snapshot)
