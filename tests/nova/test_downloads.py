"""What lazyimg does not show: Nova downloads it through the mount into the upper folder, as it ever did."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from disks import assert_reads_as, info, made_as, qemu
from nova_host import NOVA_GID, NOVA_UID, NovaFailed, NovaHost
from real_mount import Mount, wait_until
from served_glance import MIB, ServedGlance, ServedImage

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow


def whole_downloads(glance: ServedGlance, image: ServedImage) -> int:
    return sum(one["range"] is None for one in glance.data_requests(image))


def names_of(host: NovaHost, image: ServedImage) -> set[str]:
    """Return the names of the image's files in `_base`, unfinished ones too."""
    return {path.name for path in host.base.iterdir() if path.name.startswith(image.base_name)}


@pytest.mark.parametrize(
    ("disk_format", "options"),
    [("vmdk", ("-o", "subformat=streamOptimized")), ("vhdx", ()), ("vdi", ())],
)
def test_format_that_is_not_shown_is_converted_by_nova(
    host: NovaHost, glance: ServedGlance, tmp_path: Path, disk_format: str, options: tuple[str, ...]
) -> None:
    """One download, `.part` and `.converted` renamed into place: a real file of Nova's, raw, and never lazy."""
    image = glance.add(made_as(tmp_path, disk_format, 7, 8 * MIB, *options), disk_format=disk_format)
    disk = host.spawn(image.id) / "disk"
    base = host.base / image.base_name
    assert whole_downloads(glance, image) == 1
    assert (base.stat().st_uid, base.stat().st_gid) == (NOVA_UID, NOVA_GID)
    assert info(disk)["backing-filename-format"] == "raw"
    assert_reads_as(disk, "qcow2", 7, 8 * MIB)
    assert names_of(host, image) == {image.base_name}


def test_format_that_nova_refuses_is_still_refused(
    host: NovaHost, glance: ServedGlance, tmp_path: Path
) -> None:
    """Nova and qemu call a vhd by different names, upon which plain Nova gives up; nothing of it is left."""
    image = glance.add(made_as(tmp_path, "vpc", 7, 8 * MIB), disk_format="vhd")
    with pytest.raises(NovaFailed) as failure:
        host.spawn(image.id)
    assert failure.value.kind == "ImageUnacceptable"
    assert names_of(host, image) == set()


def test_image_with_a_backing_file_is_refused_by_both(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """[I8] lazyimg does not show it, Nova downloads and refuses it, and nothing of it is left."""
    (tmp_path / "secret").write_bytes(bytes(MIB))
    unsafe = tmp_path / "unsafe"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", unsafe)
    image = glance.add(unsafe.read_bytes(), disk_format="qcow2")
    with pytest.raises(NovaFailed) as failure:
        host.spawn(image.id)
    assert failure.value.kind == "ImageUnacceptable"
    assert "backing file" in mount.status_of(image)["reason"]
    assert names_of(host, image) == set()


def test_mislabelled_image_is_refused_by_both(host: NovaHost, glance: ServedGlance, tmp_path: Path) -> None:
    """[I8] A qcow2 that Glance calls raw is not shown as raw bytes, and Nova does not take it either."""
    image = glance.add(made_as(tmp_path, "qcow2", 8, 4 * MIB), disk_format="raw")
    with pytest.raises(NovaFailed) as failure:
        host.spawn(image.id)
    assert failure.value.kind == "ImageUnacceptable"
    assert names_of(host, image) == set()


def test_fetched_to_a_lazy_name_the_real_file_wins(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """[I10] Nova's own download of an image that is shown lazily takes the name over, for good."""
    image = glance.add(made_as(tmp_path, "qcow2", 9, 8 * MIB), disk_format="qcow2")
    base = mount.path_of(image)
    lazy_inode = base.stat().st_ino
    host.nova.fetch_image(image_id=image.id, target=str(base))
    assert base.stat().st_ino != lazy_inode
    assert stat.S_ISREG(base.stat().st_mode)
    assert base.stat().st_uid == NOVA_UID
    requests = len(glance.data_requests(image))
    assert_reads_as(host.spawn(image.id) / "disk", "qcow2", 9, 8 * MIB)
    assert len(glance.data_requests(image)) == requests


def test_name_that_cannot_be_decided_fails_a_spawn_and_no_later_one(
    host: NovaHost, glance: ServedGlance, tmp_path: Path
) -> None:
    """Glance lists no images: Nova takes EAGAIN for absent and downloads, but its file may not take the name yet."""
    image = glance.add(made_as(tmp_path, "qcow2", 18, 8 * MIB), disk_format="qcow2")
    # Nova itself never lists.
    glance.fail(FaultRule("reset", kind="list"))
    with pytest.raises(NovaFailed) as failure:
        host.spawn(image.id)
    assert failure.value.kind == "BlockingIOError"
    assert whole_downloads(glance, image) == 1
    assert names_of(host, image) == set()
    glance.fail()
    base = host.base / image.base_name
    # As Nova asks: it is undecided until the first answer that Glance gives again.
    wait_until(lambda: os.path.exists(base), "the image, decided at last")
    assert_reads_as(host.spawn(image.id) / "disk", "qcow2", 18, 8 * MIB)
    assert whole_downloads(glance, image) == 1


def test_kernel_can_be_downloaded_too(host: NovaHost, glance: ServedGlance) -> None:
    """fetch_raw_image writes straight to its final name, through the mount."""
    kernel = glance.add(3 * MIB + 1, disk_format="aki", container_format="aki")
    target = host.base / "kernel of a test"
    host.nova.fetch_raw_image(image_id=kernel.id, target=str(target))
    assert target.read_bytes() == kernel.content
    assert target.stat().st_uid == NOVA_UID
    target.unlink()


def test_without_forced_raw_images_the_stored_view_is_novas(
    make_host: Callable[..., tuple[NovaHost, Mount]], glance: ServedGlance, tmp_path: Path
) -> None:
    """force_raw_images=False and view="stored": the overlay names a qcow2 base and takes its cluster size over."""
    host, mount = make_host("force_raw_images = false", view="stored")
    content = made_as(tmp_path, "qcow2", 10, 8 * MIB, "-o", "cluster_size=131072")
    image = glance.add(content, disk_format="qcow2")
    disk = host.spawn(image.id, root_gb=1) / "disk"
    made = info(disk)
    assert made["backing-filename-format"] == "qcow2"
    assert made["cluster-size"] == 131072
    assert whole_downloads(glance, image) == 0
    assert mount.path_of(image).stat().st_size == len(content)
    assert_reads_as(disk, "qcow2", 10, 8 * MIB)


def test_flat_disks_are_copied_out_of_the_mount(
    make_host: Callable[..., tuple[NovaHost, Mount]], glance: ServedGlance, tmp_path: Path
) -> None:
    """images_type=flat: the instance's disk is a copy of the base, whole and in its own right."""
    host, _ = make_host("[libvirt]\nimages_type = flat\nvirt_type = qemu")
    image = glance.add(made_as(tmp_path, "qcow2", 11, 8 * MIB), disk_format="qcow2")
    disk = host.spawn(image.id, root_gb=1) / "disk"
    assert disk.stat().st_size == 1 << 30
    assert_reads_as(disk, "raw", 11, 8 * MIB)
    assert whole_downloads(glance, image) == 0
    assert os.stat(disk).st_uid == NOVA_UID
