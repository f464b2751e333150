"""What the daemon says of itself: status and metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyimg.cli.app import EXIT_CODES, ControlFlag, app, make_client, one_line

if TYPE_CHECKING:
    from rich.table import Table


@app.command(epilog=EXIT_CODES)
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    control: ControlFlag = None,
) -> None:
    """Show what the daemon holds; fails until the mount is up."""
    answer = make_client(control).status()
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console

    Console().print(_status_table(answer))


@app.command(epilog=EXIT_CODES)
def metrics(control: ControlFlag = None) -> None:
    """Print the daemon's metrics, as Prometheus reads them."""
    print(make_client(control).metrics(), end="")


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
