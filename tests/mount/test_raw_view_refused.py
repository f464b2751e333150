"""What the raw view does not show, and what of a damaged image it does: behind a real mount."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from qcow2_writer import Geometry, Image, write_image
from real_mount import Mount, read_direct
from served_glance import MIB, ServedGlance, ServedImage, pattern

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

CHUNK = 1 << 16
COUNT = 40


def qemu_image(path: Path, disk_format: str, *options: str) -> bytes:
    command = ["qemu-img", "create", "-q", "-f", disk_format, *options, str(path), "8M"]
    subprocess.run(command, check=True, cwd=path.parent)
    return path.read_bytes()


def changed(content: bytes, at: int, layout: str, value: int) -> bytes:
    """Return the content with a field of a qcow2 header or table changed."""
    source = bytearray(content)
    struct.pack_into(layout, source, at, value)
    return bytes(source)


def plain(folder: Path) -> bytes:
    return qemu_image(folder / "plain", "qcow2")


def with_backing(folder: Path) -> bytes:
    qemu_image(folder / "base", "qcow2")
    return qemu_image(folder / "image", "qcow2", "-b", "base", "-F", "qcow2")


def encrypted(folder: Path) -> bytes:
    secret = ("--object", "secret,id=key,data=secret")
    # The older of the two ways: for LUKS qemu-img measures its own CPU time, and gives up on a busy machine.
    return qemu_image(folder / "image", "qcow2", *secret, "-o", "encrypt.format=aes,encrypt.key-secret=key")


# What is uploaded as what, and a word of the reason.
REFUSED: dict[str, tuple[str, Callable[[Path], bytes], str]] = {
    "backing file": ("qcow2", with_backing, "backing file"),
    "data file": (
        "qcow2",
        lambda folder: qemu_image(folder / "image", "qcow2", "-o", f"data_file={folder / 'data'}"),
        "another file",
    ),
    "encryption": ("qcow2", encrypted, "encrypted"),
    "dirty bit": ("qcow2", lambda folder: changed(plain(folder), 72, ">Q", 1), "dirty or corrupt"),
    "corrupt bit": ("qcow2", lambda folder: changed(plain(folder), 72, ">Q", 2), "dirty or corrupt"),
    "unknown feature": (
        "qcow2",
        lambda folder: changed(plain(folder), 72, ">Q", 1 << 40),
        "features unknown",
    ),
    "L1 table outside the file": (
        "qcow2",
        lambda folder: changed(plain(folder), 40, ">Q", 1 << 40),
        "L1 table ends",
    ),
    "L1 table in the header": ("qcow2", lambda folder: changed(plain(folder), 40, ">Q", 0), "L1 table lies"),
    "absurd size": ("qcow2", lambda folder: changed(plain(folder), 24, ">Q", 1 << 62), "claims"),
    "absurd L1 table": ("qcow2", lambda folder: changed(plain(folder), 36, ">I", 0xFFFFFFFF), "claims"),
    "first table outside the file": (
        "qcow2",
        lambda folder: changed(plain(folder), 3 << 16, ">Q", 1 << 40),
        "L1 table places",
    ),
    "no qcow2": ("qcow2", lambda folder: pattern(1, MIB), "its content is raw"),
    "a qcow2 that says raw": ("raw", plain, "its content is qcow2"),
    "a vmdk that says qcow2": ("qcow2", lambda folder: qemu_image(folder / "i", "vmdk"), "content is vmdk"),
    "vmdk": ("vmdk", lambda folder: qemu_image(folder / "i", "vmdk"), "cannot be presented"),
    "vhd": ("vhd", lambda folder: qemu_image(folder / "i", "vpc"), "cannot be presented"),
    "vhdx": ("vhdx", lambda folder: qemu_image(folder / "i", "vhdx"), "cannot be presented"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_its_reason(
    kind: str, raw_mount: Mount, glance: ServedGlance, tmp_path: Path, require: Callable[..., None]
) -> None:
    """[I8] It has no name, so that Nova downloads it as ever, and status says why."""
    require("qemu-img")
    disk_format, make, reason = REFUSED[kind]
    image = glance.add(make(tmp_path), disk_format)
    with pytest.raises(FileNotFoundError):
        raw_mount.path_of(image).stat()
    assert reason in raw_mount.status_of(image)["reason"]


def test_guest_content_that_looks_like_a_format_is_refused(
    raw_mount: Mount, glance: ServedGlance, tmp_path: Path, require: Callable[..., None]
) -> None:
    """[I8] A guest that wrote a qcow2 header into its disk must not have it taken for one."""
    require("qemu-img")
    (tmp_path / "inner").write_bytes(plain(tmp_path))
    outer = tmp_path / "outer"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "inner", outer], check=True)
    image = glance.add(outer.read_bytes(), "qcow2")
    with pytest.raises(FileNotFoundError):
        raw_mount.path_of(image).stat()
    assert "its content is qcow2" in raw_mount.status_of(image)["reason"]


# ── damage behind the first MiB ──


def tables() -> Image:
    """Two tables; the second maps one chunk, the first 40, of which every other is compressed."""
    guest = {n: "compressed" if n % 2 else "data" for n in range(COUNT)} | {8192: "data"}
    return write_image(Geometry(3, 16, 8193 * CHUNK), guest, seed=3)  # type: ignore[arg-type]


def damaged_l2_entry(one: Image) -> tuple[bytes, int]:
    return changed(one.source, one.table_starts[0] + 30 * 8, ">Q", 1 << 50), 30


def looping_l2_entry(one: Image) -> tuple[bytes, int]:
    return changed(one.source, one.table_starts[0] + 30 * 8, ">Q", one.l1_start), 30


def damaged_l1_entry(one: Image) -> tuple[bytes, int]:
    return changed(one.source, one.l1_start + 8, ">Q", 1 << 50), 8192


def damaged_cluster(one: Image) -> tuple[bytes, int]:
    # The 15th compressed cluster is that of chunk 29.
    return changed(one.source, one.compressed[14][0], ">Q", (1 << 64) - 1), 29


@pytest.mark.parametrize("damage", [damaged_l2_entry, looping_l2_entry, damaged_l1_entry, damaged_cluster])
def test_damage_fails_its_chunk_alone(
    damage: Callable[[Image], tuple[bytes, int]], raw_mount: Mount, glance: ServedGlance
) -> None:
    """What a damaged entry or cluster maps is EIO, with a line in the log; all else reads, and the daemon lives."""
    one = tables()
    source, bad = damage(one)
    image = ServedImage(glance.add(source, "qcow2").id, source)
    pid = raw_mount.status()["daemon_pid"]
    shown = raw_mount.path_of(image)
    for chunk in (*range(COUNT), 8192):
        start = chunk * CHUNK
        if chunk != bad:
            assert read_direct(shown, start, CHUNK) == one.read(start, start + CHUNK)
            continue
        for _ in range(2):
            with pytest.raises(OSError, match=os.strerror(errno.EIO)):
                read_direct(shown, start, CHUNK)
    lines = [line for line in raw_mount.log().splitlines() if image.id in line]
    assert any("WARNING" in line and "qcow2" in line for line in lines)
    assert raw_mount.status()["daemon_pid"] == pid


def test_lie_about_a_table_harms_nobody(raw_mount: Mount, glance: ServedGlance) -> None:
    """Short bodies, stalls and wrong ranges while tables and clusters come change no byte."""
    one = tables()
    image = ServedImage(glance.add(one.source, "qcow2").id, one.source)
    glance.fail(
        FaultRule("short_body", image_id=image.id, count=2, bytes=100_000),
        FaultRule("wrong_content_range", image_id=image.id, first=3, count=1),
        FaultRule("empty_204", image_id=image.id, first=4, count=1),
        FaultRule("whole_body", image_id=image.id, first=5, count=1),
    )
    for chunk in (8192, *range(COUNT)):
        start = chunk * CHUNK
        found = raw_mount.read_later(image, start, CHUNK).result(60)
        assert found == one.read(start, start + CHUNK)


def test_view_is_not_changed_under_an_image_in_use(
    make_mount: Callable[..., Mount], glance: ServedGlance, tmp_path: Path, require: Callable[..., None]
) -> None:
    """[I1] With a qcow2 image in use the other view is refused at start; once its name is removed there it is taken."""
    require("qemu-img")
    image = glance.add(plain(tmp_path), disk_format="qcow2")
    before = make_mount(glance, view="raw")
    before.path_of(image).read_bytes()
    assert before.stop() == 0
    refused = make_mount(glance, "refused", start=False, view="stored", cache_dir=before.cache_dir)
    refused.launch()
    assert refused.wait_ended() == 2
    assert "config key 'view': these images are in use here with view = 'raw'" in refused.log()
    assert image.id in refused.log()
    before.start()
    before.path_of(image).unlink()
    assert before.stop() == 0
    after = make_mount(glance, "after", view="stored", cache_dir=before.cache_dir)
    assert after.path_of(image).read_bytes() == image.content
