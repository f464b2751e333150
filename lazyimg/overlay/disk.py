"""A guest's disk: a qcow2 overlay on an image's base, as Nova's Qcow2.create_image makes it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lazyimg.control import ControlClient, ImageFacts
from lazyimg.errors import DestinationRefused, ImageRefused
from lazyimg.overlay.base import Base, judge_base, locate, touch
from lazyimg.overlay.baselock import base_lock
from lazyimg.overlay.placement import Placement
from lazyimg.overlay.qemuimg import create_qcow2, qcow2_facts


@dataclass(frozen=True, slots=True)
class OverlayResult:
    """An overlay that was made, and the base it stands on."""

    path: Path
    size_bytes: int
    image_id: str
    base_path: Path
    base_format: str


def create_overlay(
    client: ControlClient,
    image: str,
    dest: Path,
    *,
    base_dir: Path | None = None,
    size_bytes: int | None = None,
) -> OverlayResult:
    """Make a qcow2 disk `dest` on top of an image (id or unique name).

    size_bytes: None for the image's own size, or its min_disk if that is more.  base_dir: the mount, None for
    where the daemon says it is.  Raises DestinationRefused if `dest` exists or the size is too small,
    ImageRefused, and what the daemon raises; nothing is left behind then.
    """
    dest = Path(os.path.abspath(dest))
    with Placement() as placement:
        hidden = placement.stage(dest)
        result = stage_overlay(hidden, dest, client.image_facts(image), base_dir, size_bytes)
        placement.commit()
    return result


def stage_overlay(
    hidden: Path, dest: Path, facts: ImageFacts, base_dir: Path | None, size_bytes: int | None
) -> OverlayResult:
    """Make the overlay at `hidden`, which is to appear at `dest`."""
    base_path = locate(facts, base_dir)
    with base_lock(base_path):
        base = judge_base(facts, base_path)
        touch(base)
        size_bytes = _judge_size(base, dest, size_bytes)
        cluster_size_bytes = _qcow2_cluster_size(base)
        create_qcow2(
            hidden,
            backing=base_path,
            backing_format=base.verdict.presented_format,
            size_bytes=size_bytes,
            cluster_size_bytes=cluster_size_bytes,
        )
    return OverlayResult(dest, size_bytes, facts.id, base_path, base.verdict.presented_format)


def _judge_size(base: Base, dest: Path, size_bytes: int | None) -> int:
    """Return the size to make, at least what image and min_disk need."""
    min_disk_bytes = base.facts.min_disk_gib << 30
    needed_bytes = max(base.verdict.virtual_size_bytes, min_disk_bytes)
    if size_bytes is None:
        return needed_bytes
    if size_bytes < needed_bytes:
        raise DestinationRefused(
            f"destination {dest}: {size_bytes} bytes are too few for image {base.facts.id}, which has"
            f" {base.verdict.virtual_size_bytes} and a min_disk of {base.facts.min_disk_gib} GiB;"
            f" give at least {needed_bytes}"
        )
    return size_bytes


def _qcow2_cluster_size(base: Base) -> int | None:
    """Return the cluster size an overlay takes over from a base shown as qcow2, which Nova does too.

    qemu's opinion of the base must be the header's; what qemu would open besides it is refused.
    """
    if base.verdict.presented_format != "qcow2":
        return None
    found = qcow2_facts(base.path)
    specific = (found.get("format-specific") or {}).get("data") or {}
    if found.get("backing-filename") or specific.get("data-file"):
        raise ImageRefused(f"image {base.facts.id}: qemu would open another file with it; convert it to raw")
    if found.get("virtual-size") != base.verdict.virtual_size_bytes:
        raise ImageRefused(
            f"image {base.facts.id}: qemu sees {found.get('virtual-size')} bytes, its header says"
            f" {base.verdict.virtual_size_bytes}; convert it to raw"
        )
    return base.verdict.cluster_size_bytes
