"""The command line: reads flags, calls one thing, prints the outcome.

Errors are one line on standard error and an exit code (errors.py has the table).  Everything heavy is
imported inside the command that needs it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyimg import __version__
from lazyimg.errors import LazyImgError

if TYPE_CHECKING:
    from rich.table import Table

    from lazyimg.config import Config
    from lazyimg.control import ControlClient, Progress
    from lazyimg.overlay import OverlayResult

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 daemon or Glance does not answer, "
    "4 no such image, 5 image refused, 6 in use, 7 destination refused, 8 credentials refused, "
    "9 cache unusable, 10 cannot mount, 130 interrupted, 143 terminated."
)

app = typer.Typer(
    help="Start virtual machines on Glance images that have not been downloaded.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    # Locals in a traceback could show a token.
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
)
overlay_app = typer.Typer(help="Disks on top of images.", epilog=EXIT_CODES, no_args_is_help=True)
instance_app = typer.Typer(help="The files of one instance.", epilog=EXIT_CODES, no_args_is_help=True)
app.add_typer(overlay_app, name="overlay")
app.add_typer(instance_app, name="instance")

ControlFlag = Annotated[
    Path | None,
    typer.Option("--control", metavar="SOCKET", help="The daemon's control socket [default: from config]."),
]
BaseDirFlag = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The mount [default: where the daemon says it is].")
]
SizeFlag = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Size of the disk, such as 20G [default: the image's].")
]
ImageArgument = Annotated[
    str, typer.Argument(metavar="IMAGE", help="Image id, or a name only one image has.")
]


def main() -> None:
    """Run the command line and exit; every LazyImgError becomes one line and its exit code."""
    try:
        app()
    except LazyImgError as exc:
        print(f"lazyimg: {one_line(str(exc))}", file=sys.stderr)
        sys.exit(exc.exit_code)


def one_line(text: str) -> str:
    """Return text on one line without control characters: names and messages come from other people."""
    return "".join(char if char.isprintable() else " " for char in text)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"lazyimg {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Start virtual machines on Glance images that have not been downloaded."""


# ── the daemon ──


@app.command(epilog=EXIT_CODES)
def mount(
    mountpoint: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to mount on, such as Nova's _base.")
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="F", envvar="LAZYIMG_CONFIG", help="TOML file [default: /etc/lazyimg/lazyimg.toml]."
        ),
    ] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Glance without authentication; may be repeated.")
    ] = None,
    cloud: Annotated[
        str | None, typer.Option(metavar="NAME", help='Name in clouds.yaml, or "envvars" for OS_*.')
    ] = None,
    cache_dir: Annotated[Path | None, typer.Option(metavar="D", help="Where fetched bytes are kept.")] = None,
    control: ControlFlag = None,
) -> None:
    """Show Glance's images under DIR, in the foreground; SIGTERM unmounts."""
    from lazyimg.config import load_config

    flags = {
        "endpoint": tuple(endpoint) if endpoint else None,
        "cloud": cloud,
        "cache_dir": cache_dir,
        "control": control,
    }
    settings = load_config(config, flags)
    set_up_logging(settings)
    from lazyimg.daemon.holder import run_mount

    sys.exit(run_mount(settings, mountpoint))


@app.command(epilog=EXIT_CODES)
def umount(
    mountpoint: Annotated[Path, typer.Argument(metavar="DIR", help="The mount.")],
    lazy: Annotated[bool, typer.Option("--lazy", help="Detach it even if it is busy.")] = False,
) -> None:
    """Unmount DIR; refused while it is busy, naming the processes that hold it."""
    from lazyimg.daemon.mountpoint import umount as unmount

    unmount(mountpoint, lazy=lazy)


def set_up_logging(config: Config) -> None:
    """Log to standard error at the configured level; under systemd the journal adds the time itself."""
    when = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
    logging.basicConfig(
        level=config.log_level, stream=sys.stderr, format=f"{when}%(levelname)s %(name)s: %(message)s"
    )


# ── questions to the daemon ──


def _client(control: Path | None) -> ControlClient:
    """Return the client of `--control`, else of the config's socket."""
    from lazyimg.config import load_config
    from lazyimg.control import ControlClient

    _exit_on_signals()
    # With the flag the config is not needed, and need not be readable.
    return ControlClient(control or load_config(_config_path()).control)


def _config_path() -> Path | None:
    path = os.environ.get("LAZYIMG_CONFIG")
    return Path(path) if path else None


def _exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP exceptions, so that nothing half-made is left behind."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)


@app.command(epilog=EXIT_CODES)
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    control: ControlFlag = None,
) -> None:
    """Show what the daemon holds; fails until the mount is up."""
    answer = _client(control).status()
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console

    Console().print(_status_table(answer))


def _status_table(answer: Mapping[str, Any]) -> Table:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"daemon {answer.get('daemon_pid')}", title_justify="left")
    for heading in ("image", "name", "state", "source"):
        table.add_column(heading)
    for heading in ("size", "present", "fetched", "requests", "open"):
        table.add_column(heading, justify="right")
    for image in answer.get("images", ()):
        words = (image.get(key) for key in ("id", "name", "state", "source"))
        sizes = (image.get(key) for key in ("size_bytes", "present_bytes", "fetched_bytes"))
        counts = (image.get(key) for key in ("requests", "open_handles"))
        table.add_row(
            # Text, not str: a name may look like markup.
            *(Text(one_line(str(word or ""))) for word in words),
            *(decimal(size) if isinstance(size, int) else "" for size in sizes),
            *(str(count) for count in counts),
        )
    return table


@app.command(epilog=EXIT_CODES)
def prefetch(image: ImageArgument, control: ControlFlag = None) -> None:
    """Fetch all of IMAGE now."""
    _watch(f"prefetch {image}", _client(control).prefetch(image))


@app.command(epilog=EXIT_CODES)
def evict(image: ImageArgument, control: ControlFlag = None) -> None:
    """Drop what is cached of IMAGE; refused while it is open."""
    freed_bytes = _client(control).evict(image)
    print(f"{one_line(image)}: {freed_bytes} bytes freed")


@app.command(epilog=EXIT_CODES)
def verify(image: ImageArgument, control: ControlFlag = None) -> None:
    """Check what is cached of IMAGE; exit code 1 if anything is damaged."""
    last = _watch(f"verify {image}", _client(control).verify(image))
    if last is None:
        raise LazyImgError(f"image {image}: the daemon gave no verdict; see its log")
    if last.damaged_chunks:
        raise LazyImgError(
            f"image {image}: {last.damaged_chunks} chunks are damaged; they will be fetched again"
        )
    if last.source_hash == "mismatch":
        raise LazyImgError(
            f"image {image}: it does not match Glance's hash; run lazyimg evict, then read it again"
        )
    verdict = "matches Glance's hash" if last.source_hash == "match" else "undamaged; source hash not known"
    print(f"{one_line(image)}: {last.done_bytes} of {last.total_bytes} bytes checked, {verdict}")


def _watch(label: str, steps: Iterator[Progress]) -> Progress | None:
    """Draw a progress bar on standard error until the work is done; return its last step."""
    from rich import progress as bars
    from rich.console import Console
    from rich.markup import escape

    last = None
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(binary_units=True),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as drawn:
        bar = drawn.add_task(escape(one_line(label)), total=None)
        for last in steps:
            drawn.update(bar, completed=last.done_bytes, total=last.total_bytes)
    return last


# ── the companion ──


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

    result = create_overlay(_client(control), image, dest, base_dir=base_dir, size_bytes=_size_bytes(size))
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
        _client(control),
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


@app.command(epilog=EXIT_CODES)
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Keep the files for a look.")] = False,
) -> None:
    """Boot a small guest from an image nobody has downloaded, with a Glance of its own."""
    from lazyimg.demo.run import run_demo

    sys.exit(run_demo(keep=keep))
