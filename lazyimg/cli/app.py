"""What all commands share: the application, its flags, the way errors end it, and the client of a daemon."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyimg import __version__
from lazyimg.errors import LazyImgError

if TYPE_CHECKING:
    from lazyimg.config import Config
    from lazyimg.control import ControlClient

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 wrong usage or config, 3 daemon or Glance does not answer, "
    "4 no such image, 5 image refused, 6 in use, 7 destination refused, 8 credentials refused, "
    "9 cache unusable, 10 cannot mount, 11 not restarted, 130 interrupted, 143 terminated."
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
ConfigFlag = Annotated[
    Path | None,
    typer.Option(
        metavar="F", envvar="LAZYIMG_CONFIG", help="TOML file [default: /etc/lazyimg/lazyimg.toml]."
    ),
]
EndpointFlag = Annotated[
    list[str] | None, typer.Option(metavar="URL", help="Glance without authentication; may be repeated.")
]
CloudFlag = Annotated[
    str | None, typer.Option(metavar="NAME", help='Name in clouds.yaml, or "envvars" for OS_*.')
]
# `parser`: left to itself the command line's library stats each path, and hangs with the disk or the mount.
CacheDirFlag = Annotated[
    Path | None, typer.Option(metavar="D", parser=Path, help="Where fetched bytes are kept.")
]
BaseDirFlag = Annotated[
    Path | None,
    typer.Option(metavar="DIR", parser=Path, help="The mount [default: where the daemon says it is]."),
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


def given_flags(
    endpoint: list[str] | None, cloud: str | None, cache_dir: Path | None, control: Path | None
) -> dict[str, Any]:
    """Return the flags that are configuration keys, None for those not given."""
    return {
        "endpoint": tuple(endpoint) if endpoint else None,
        "cloud": cloud,
        "cache_dir": cache_dir,
        "control": control,
    }


def load_settings(config: Path | None, flags: dict[str, Any]) -> Config:
    """Return the configuration, the flags before all else."""
    from lazyimg.config import load_config

    return load_config(config, flags)


def make_client(control: Path | None) -> ControlClient:
    """Return the client of `--control`, else of the config's socket."""
    from lazyimg.config import load_config
    from lazyimg.control import ControlClient

    exit_on_signals()
    # With the flag the config is not needed, and need not be readable.
    return ControlClient(control or load_config(config_path()).control)


def config_path() -> Path | None:
    path = os.environ.get("LAZYIMG_CONFIG")
    return Path(path) if path else None


def exit_on_signals() -> None:
    """Make SIGTERM and SIGHUP exceptions, so that nothing half-made is left behind."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
