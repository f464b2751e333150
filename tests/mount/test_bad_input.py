"""What an operator can get wrong: one clear line, the documented exit code, and nothing left behind."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from real_mount import Mount, is_mounted, lazyimg
from served_glance import MIB, ServedGlance

from lazyimg.glance.records import parse_record

pytestmark = pytest.mark.slow


def qemu_image(path: Path, disk_format: str, *options: str) -> bytes:
    command = ["qemu-img", "create", "-q", "-f", disk_format, *options, str(path), "8M"]
    subprocess.run(command, check=True, cwd=path.parent)
    return path.read_bytes()


def assert_refused(result: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line that has these words, no traceback, nothing on standard output."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("lazyimg: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def overlay(mounted: Mount, tmp_path: Path, require: Callable[..., None]) -> Iterator[Callable[..., object]]:
    """Return `overlay(image, *options)`: runs `lazyimg overlay create`; what it leaves behind fails the test."""
    require("qemu-img")
    folder = tmp_path / "instance"
    folder.mkdir()

    def create(image: str, *options: str) -> subprocess.CompletedProcess[str]:
        words = ("overlay", "create", image, folder / "disk", *options, "--control", mounted.control)
        return lazyimg(*words)

    yield create
    assert os.listdir(folder) == []


# ── images ──


def test_unknown_image(overlay: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """An id and a name that Glance does not have are exit code 4."""
    unknown = str(uuid.uuid4())
    assert_refused(overlay(unknown), 4, unknown)
    assert_refused(overlay("no such name"), 4, "no such name")


def test_deleted_image(
    glance: ServedGlance, overlay: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """An image that was deleted before it was ever used is exit code 4."""
    image = glance.add(MIB)
    glance.delete(image)
    assert_refused(overlay(image.id), 4, image.id)


def test_deleted_image_of_which_only_a_part_is_here(
    mounted: Mount, glance: ServedGlance, overlay: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """An image that was deleted after a part of it was read is not a base for a new disk."""
    image = glance.add(8 * MIB)
    mounted.path_of(image).stat()
    glance.delete(image)
    assert_refused(overlay(image.id), 4, image.id)


def test_deactivated_image(
    glance: ServedGlance, overlay: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A deactivated image is exit code 5, and works again once it is reactivated."""
    image = glance.add(MIB)
    glance.act(image, "deactivate")
    assert_refused(overlay(image.id), 5, image.id, "deactivated")


def test_queued_image(glance: ServedGlance, overlay: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """An image without data yet is exit code 5, naming its status."""
    image_id = glance.add_queued()
    assert_refused(overlay(image_id), 5, image_id, "queued")


def test_name_of_two_images(
    glance: ServedGlance, overlay: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A name that two images have is refused: an id is wanted."""
    name = f"twin {uuid.uuid4()}"
    for _ in range(2):
        glance.add(1000, name=name)
    assert_refused(overlay(name), 4, name, "2 images", "give an id")


# ── formats ──


def _with_backing(folder: Path) -> bytes:
    qemu_image(folder / "base.qcow2", "qcow2")
    return qemu_image(folder / "image", "qcow2", "-b", "base.qcow2", "-F", "qcow2")


def _with_data_file(folder: Path) -> bytes:
    return qemu_image(folder / "image", "qcow2", "-o", f"data_file={folder / 'data'}")


def _with_unknown_bit(folder: Path) -> bytes:
    content = bytearray(qemu_image(folder / "image", "qcow2"))
    # qcow2 spec, "Header": bytes 72 to 79 are the incompatible features.
    struct.pack_into(">Q", content, 72, 1 << 40)
    return bytes(content)


BAD_CONTENT: dict[str, tuple[str, Callable[[Path], bytes]]] = {
    "vmdk": ("vmdk", lambda folder: qemu_image(folder / "image", "vmdk")),
    "vhdx": ("vhdx", lambda folder: qemu_image(folder / "image", "vhdx")),
    "vhd": ("vhd", lambda folder: qemu_image(folder / "image", "vpc")),
    "backing file": ("qcow2", _with_backing),
    "data file": ("qcow2", _with_data_file),
    "unknown incompatible bit": ("qcow2", _with_unknown_bit),
    "qcow2 that says raw": ("raw", lambda folder: qemu_image(folder / "image", "qcow2")),
    "vmdk that says raw": ("raw", lambda folder: qemu_image(folder / "image", "vmdk")),
    "raw that says qcow2": ("qcow2", lambda folder: b"no header" * 1000),
    "vhdx that says iso": ("iso", lambda folder: qemu_image(folder / "image", "vhdx")),
}


@pytest.mark.parametrize("what", BAD_CONTENT)
def test_image_that_must_not_be_shown(
    what: str,
    mounted: Mount,
    glance: ServedGlance,
    overlay: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """[I8] A foreign, unsafe or mislabelled image is exit code 5 for the companion, and has no name in the mount."""
    disk_format, make = BAD_CONTENT[what]
    folder = tmp_path / "made"
    folder.mkdir()
    image = glance.add(make(folder), disk_format)
    for _ in range(2):
        # The second time it is remembered; either way nothing of it is shown.
        assert_refused(overlay(image.id), 5, image.id)
        assert not mounted.path_of(image).exists()
        assert not (mounted.path / image.id).is_symlink()
    said = mounted.status_of(image)
    assert (said["state"], said["present_bytes"]) == ("refused", 0)
    assert image.id in said["reason"]
    key = parse_record(glance.record(image)).key("stored")
    assert not list((mounted.cache_dir / "chunks").glob(f"{key}.*"))


# ── destinations ──


def test_destination_that_exists(mounted: Mount, glance: ServedGlance, tmp_path: Path) -> None:
    """A DEST that exists is exit code 7, and stays what it is."""
    image = glance.add(MIB)
    dest = tmp_path / "disk"
    dest.write_bytes(b"a guest's disk")
    result = lazyimg("overlay", "create", image.id, dest, "--control", mounted.control)
    assert_refused(result, 7, str(dest), "exists")
    assert dest.read_bytes() == b"a guest's disk"


def test_size_under_the_images(
    glance: ServedGlance, overlay: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """A size smaller than the image is exit code 7, and says what would do."""
    image = glance.add(4 * MIB)
    assert_refused(overlay(image.id, "--size", "2M"), 7, image.id, str(4 * MIB))


# ── mounting ──


@pytest.fixture
def refused(make_mount: Callable[..., Mount]) -> Callable[..., None]:
    """Return `refused(mount, code, *words)`: starts it, which must fail so, and leave nothing."""

    def check(mount: Mount, code: int, *words: str) -> None:
        mount.launch()
        assert mount.wait_ended() == code, mount.log()
        lines = [line for line in mount.log().splitlines() if line.startswith("lazyimg: ")]
        assert len(lines) == 1
        assert "Traceback" not in mount.log()
        for word in words:
            assert word in lines[0], lines[0]
        assert not mount.control.exists()

    return check


def test_mountpoint_in_use(
    make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None], tmp_path: Path
) -> None:
    """A second mount at the same place is exit code 6, and the first goes on."""
    mount = make_mount(glance)
    second = make_mount(glance, name="other", start=False)
    second.path.rmdir()
    second.path = mount.path
    refused(second, 6, str(mount.path), "lazyimg is mounted there")
    second.path = tmp_path
    assert mount.status()["mountpoint"] == str(mount.path)


def test_mountpoint_of_another_file_system(
    make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None]
) -> None:
    """A folder with another file system mounted on it is exit code 6, and keeps that."""
    mount = make_mount(glance, start=False)
    subprocess.run(["mount", "-t", "tmpfs", "none", str(mount.path)], check=True)
    try:
        refused(mount, 6, "tmpfs")
        assert is_mounted(mount.path)
    finally:
        subprocess.run(["umount", str(mount.path)], check=True)


@pytest.mark.parametrize("what", ["a file", "nothing"])
def test_mountpoint_that_is_no_folder(
    what: str, make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None]
) -> None:
    """A mountpoint that is a file, or not there, is exit code 10."""
    mount = make_mount(glance, start=False)
    mount.path.rmdir()
    if what == "a file":
        mount.path.write_bytes(b"")
    refused(mount, 10, str(mount.path), "folder")


def test_cache_of_another_version(
    make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None]
) -> None:
    """A cache folder of another version is exit code 9 and is not touched; nothing stays mounted."""
    mount = make_mount(glance, start=False)
    mount.cache_dir.mkdir(mode=0o700)
    (mount.cache_dir / "version").write_text("7\n")
    refused(mount, 9, str(mount.cache_dir), "version")
    assert not is_mounted(mount.path)
    assert os.listdir(mount.cache_dir) == ["version"]


def test_cache_of_another_owner(
    make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None]
) -> None:
    """A cache folder of somebody else is exit code 9; nothing stays mounted."""
    mount = make_mount(glance, start=False)
    mount.cache_dir.mkdir(mode=0o700)
    os.chown(mount.cache_dir, 12345, -1)
    refused(mount, 9, str(mount.cache_dir), "12345")
    assert not is_mounted(mount.path)
    shutil.rmtree(mount.cache_dir)


def test_cache_in_use(
    make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None]
) -> None:
    """A cache folder that another daemon uses is exit code 6, and names its process."""
    mount = make_mount(glance)
    second = make_mount(glance, name="other", cache_dir=mount.cache_dir, start=False)
    refused(second, 6, str(mount.cache_dir), str(mount.status()["daemon_pid"]))
    assert not is_mounted(second.path)


def test_control_socket_in_use(
    make_mount: Callable[..., Mount], glance: ServedGlance, refused: Callable[..., None]
) -> None:
    """A control socket on which another daemon answers is exit code 6, and stays its."""
    mount = make_mount(glance)
    second = make_mount(glance, name="other", start=False)
    second.control = mount.control
    second.launch()
    assert second.wait_ended() == 6
    assert str(mount.control) in second.log()
    assert not is_mounted(second.path)
    assert mount.status()["mountpoint"] == str(mount.path)


def test_no_glance_at_start(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """Without Glance the daemon starts; the companion is told so with exit code 3, and leaves nothing."""
    glance = make_glance()
    image = glance.add(MIB)
    glance.stop()
    mount = make_mount(glance, lookup_timeout=0.5)
    dest = mount.folder / "disk"
    result = lazyimg("overlay", "create", image.id, dest, "--control", mount.control)
    assert_refused(result, 3, image.id)
    assert not dest.exists()
    glance.start()
    assert mount.path_of(image).read_bytes() == image.content
