"""The files of one instance, all of them or none: disk, kernel, ramdisk and config drive, by Nova's names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lazyimg.control import ControlClient
from lazyimg.overlay.configdrive import write_config_drive
from lazyimg.overlay.disk import OverlayResult, stage_overlay
from lazyimg.overlay.placement import Placement
from lazyimg.overlay.plainfile import stage_plain

# EC2's way to say "this image has a kernel of its own"; old images carry it as their kernel_id.
NO_KERNEL = "nokernel"


@dataclass(frozen=True, slots=True)
class InstanceResult:
    """The files that were made; None for those the instance does not have."""

    directory: Path
    disk: OverlayResult
    kernel: Path | None
    ramdisk: Path | None
    config_drive: Path | None


def create_instance(
    client: ControlClient,
    directory: Path,
    *,
    image: str,
    kernel_id: str | None = None,
    ramdisk_id: str | None = None,
    size_bytes: int | None = None,
    config_drive: Path | None = None,
    base_dir: Path | None = None,
) -> InstanceResult:
    """Make `disk`, and `kernel`, `ramdisk` and `disk.config` as far as there are such, in `directory`.

    kernel_id, ramdisk_id: None for the image's own properties.  config_drive: the folder that becomes an ISO
    labelled config-2.  The directory is made if absent, its parent must be there.  Raises as create_overlay
    and fetch_plain do, ConfigError for a config drive that cannot be; everything made is removed then.
    """
    directory = Path(os.path.abspath(directory))
    with Placement() as placement:
        placement.make_folder(directory)
        facts = client.image_facts(image)
        disk = directory / "disk"
        overlay = stage_overlay(placement.stage(disk), disk, facts, base_dir, size_bytes)
        made: dict[str, Path | None] = {}
        for name, wanted, own in (
            ("kernel", kernel_id, facts.properties.get("kernel_id")),
            ("ramdisk", ramdisk_id, facts.properties.get("ramdisk_id")),
        ):
            image_id = wanted or own
            made[name] = None
            if image_id and image_id != NO_KERNEL:
                made[name] = path = directory / name
                stage_plain(placement.stage(path), path, client.image_facts(image_id), base_dir)
        drive = None
        if config_drive is not None:
            drive = directory / "disk.config"
            write_config_drive(config_drive, placement.stage(drive))
        placement.commit()
    return InstanceResult(directory, overlay, made["kernel"], made["ramdisk"], drive)
