"""The commands that run something: the mount, its end, and the demo."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from lazyimg.cli.app import (
    EXIT_CODES,
    CacheDirFlag,
    CloudFlag,
    ConfigFlag,
    ControlFlag,
    EndpointFlag,
    app,
    given_flags,
    load_settings,
    make_client,
)
from lazyimg.logs import set_up_logging

# `parser`: left to itself the command line's library stats each path, and hangs on a mount without a daemon.


@app.command(epilog=EXIT_CODES)
def mount(
    mountpoint: Annotated[
        Path, typer.Argument(metavar="DIR", parser=Path, help="Folder to mount on, such as Nova's _base.")
    ],
    config: ConfigFlag = None,
    endpoint: EndpointFlag = None,
    cloud: CloudFlag = None,
    cache_dir: CacheDirFlag = None,
    control: ControlFlag = None,
) -> None:
    """Show Glance's images under DIR, in the foreground; SIGTERM unmounts."""
    flags = given_flags(endpoint, cloud, cache_dir, control)
    settings = load_settings(config, flags)
    set_up_logging(settings.log_level)
    from lazyimg.daemon.handover import ConfigSource
    from lazyimg.daemon.holder import run_mount

    # In JSON's kinds: a daemon that `lazyimg restart` starts reads the configuration anew.
    given = {
        key: list(value) if isinstance(value, tuple) else str(value) for key, value in flags.items() if value
    }
    source = ConfigSource(None if config is None else os.path.abspath(config), given)
    sys.exit(run_mount(settings, source, mountpoint))


@app.command(epilog=EXIT_CODES)
def restart(control: ControlFlag = None) -> None:
    """Replace the daemon by one of the installed version, with the config as it is now; open files stay open."""
    old_pid, pid = make_client(control).restart()
    print(f"daemon {old_pid} has been replaced by daemon {pid}")


@app.command(epilog=EXIT_CODES)
def umount(
    mountpoint: Annotated[Path, typer.Argument(metavar="DIR", parser=Path, help="The mount.")],
    lazy: Annotated[bool, typer.Option("--lazy", help="Detach it even if it is busy.")] = False,
) -> None:
    """Unmount DIR; refused while it is busy, naming the processes that hold it."""
    from lazyimg.daemon.mountpoint import umount as unmount

    unmount(mountpoint, lazy=lazy)


@app.command(epilog=EXIT_CODES)
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Keep the files for a look.")] = False,
) -> None:
    """Boot a small guest from an image nobody has downloaded, with a Glance of its own."""
    from lazyimg.demo.run import run_demo

    sys.exit(run_demo(keep=keep))
