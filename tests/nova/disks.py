"""Disk images made and compared with qemu-img."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

from served_glance import ServedGlance, pattern


def qemu(*words: object) -> str:
    """Run qemu-img or qemu-io and return what it printed."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def info(disk: Path) -> dict[str, Any]:
    """Return what qemu-img says of a qcow2 disk, without what differs between two of the same making."""
    found: dict[str, Any] = json.loads(
        qemu("qemu-img", "info", "-f", "qcow2", "--force-share", "--output=json", disk)
    )
    for name in ("filename", "actual-size", "children"):
        found.pop(name, None)
    return found


def made_as(folder: Path, image_format: str, number: int, size_bytes: int, *options: str) -> bytes:
    """Return an image of this format with `pattern(number, size_bytes)` in it, and a hole of as much behind."""
    raw, image = folder / f"{number}.raw", folder / f"{number}.{image_format}"
    raw.write_bytes(pattern(number, size_bytes))
    with raw.open("r+b") as file:
        file.truncate(2 * size_bytes)
    qemu("qemu-img", "convert", "-f", "raw", "-O", image_format, *options, raw, image)
    return image.read_bytes()


def assert_reads_as(disk: Path, disk_format: str, number: int, size_bytes: int) -> None:
    """A disk holds what `made_as` put in it, and zeros from there to its end."""
    original = disk.parent / f"{disk.name}.original"
    original.write_bytes(pattern(number, size_bytes))
    try:
        # Without -s it is no difference that the disk is larger, if what is behind reads as zeros.
        said = qemu("qemu-img", "compare", "-f", disk_format, "-F", "raw", disk, original)
        assert "identical" in said
    finally:
        original.unlink()


def as_raw(disk: Path, dest: Path) -> bytes:
    """Return what a qcow2 disk reads as."""
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", disk, dest)
    return dest.read_bytes()


def downloaded(glance: ServedGlance, image_id: str) -> bytes:
    """Return an image's bytes as Glance has them."""
    with urllib.request.urlopen(f"{glance.url}/v2/images/{image_id}/file", timeout=60) as answer:
        data: bytes = answer.read()
        return data
