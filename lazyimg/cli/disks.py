"""The companion: disks on top of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lazyimg.cli.app import (
    EXIT_CODES,
    BaseDirFlag,
    ControlFlag,
    ImageArgument,
    SizeFlag,
    instance_app,
    make_client,
    one_line,
    overlay_app,
)

if TYPE_CHECKING:
    from lazyimg.overlay import OverlayResult


@overlay_app.command("create", epilog=EXIT_CODES)
def overlay_create(
    image: ImageArgument,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="The qcow2 disk to make; must not exist.")],
    size: SizeFlag = None,
    base_dir: BaseDirFlag = None,
    control: ControlFlag = None,
) -> None:
    """Make a qcow2 disk on top of IMAGE."""
    from lazyimg.overlay import create_overlay

    result = create_overlay(
        make_client(control), image, dest, base_dir=base_dir, size_bytes=_size_bytes(size)
    )
    _print_overlay(result)


@instance_app.command("create", epilog=EXIT_CODES)
def instance_create(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the files; made if absent.")],
    image: Annotated[str, typer.Option(metavar="I", help="Image id or unique name of the disk.")],
    kernel_id: Annotated[
        str | None, typer.Option(metavar="K", help="Kernel image [default: the image's kernel_id].")
    ] = None,
    ramdisk_id: Annotated[
        str | None, typer.Option(metavar="R", help="Ramdisk image [default: the image's ramdisk_id].")
    ] = None,
    size: SizeFlag = None,
    config_drive: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder that becomes disk.config, an ISO named config-2."),
    ] = None,
    base_dir: BaseDirFlag = None,
    control: ControlFlag = None,
) -> None:
    """Make disk, kernel and ramdisk of one instance, all or nothing."""
    from lazyimg.overlay import create_instance

    result = create_instance(
        make_client(control),
        directory,
        image=image,
        kernel_id=kernel_id,
        ramdisk_id=ramdisk_id,
        size_bytes=_size_bytes(size),
        config_drive=config_drive,
        base_dir=base_dir,
    )
    _print_overlay(result.disk)
    for path in (result.kernel, result.ramdisk, result.config_drive):
        if path is not None:
            print(one_line(str(path)))


def _size_bytes(size: str | None) -> int | None:
    from lazyimg.config import parse_size

    return None if size is None else parse_size(size)


def _print_overlay(result: OverlayResult) -> None:
    print(one_line(f"{result.path}: {result.size_bytes} bytes on {result.base_path} ({result.base_format})"))
