"""What the daemon says of itself: status and metrics."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lazyimg.cli.app import EXIT_CODES, ControlFlag, app, make_client, one_line

if TYPE_CHECKING:
    from rich.table import Table

# Rows of reads on a screen, the oldest; --json has more.
READS_SHOWN_MAX = 20


@app.command(epilog=EXIT_CODES)
def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    control: ControlFlag = None,
) -> None:
    """Show what the daemon holds, what hangs and what is at risk; fails until the mount is up."""
    answer = make_client(control).status()
    if as_json:
        print(json.dumps(answer))
        return
    from rich.console import Console

    console = Console()
    for line in _headlines(answer):
        console.print(one_line(line), markup=False, highlight=False)
    for table in _tables(answer):
        console.print(table)


@app.command(epilog=EXIT_CODES)
def metrics(control: ControlFlag = None) -> None:
    """Print the daemon's metrics, as Prometheus reads them."""
    print(make_client(control).metrics(), end="")


def _headlines(answer: Mapping[str, Any]) -> Iterator[str]:
    """What a person must know first, a line each."""
    age_s = time.time() - answer.get("started_at_s", time.time())
    yield (
        f"daemon {answer.get('daemon_pid')}, lazyimg {answer.get('version', '?')}, up {_duration(age_s)}: "
        f"{answer.get('mountpoint')}, view {answer.get('view')}"
    )
    if answer.get("survives_kill") is False:
        yield "this kernel does not send again what a killed daemon had taken: guests would hang (Linux 6.9 does)"
    if answer.get("requests_stuck"):
        yield f"{answer['requests_stuck']} requests are stuck in the kernel: a killed daemon took them"
    if answer.get("cache_is_full"):
        yield "the cache is full: guests are served without storing"
    if answer.get("unforeseen_errors"):
        yield f"{answer['unforeseen_errors']} requests failed by a fault of lazyimg's own: see the log"
    if answer.get("disk_state", "normal") != "normal":
        yield f"the cache disk is in state {answer['disk_state']}: {answer.get('disk_error')}"
    if answer.get("glance", {}).get("is_down"):
        why = answer["glance"].get("login_error") or "no endpoint answers"
        yield f"Glance is down: {why}; what is in the cache is read on"
    for image in answer.get("images", ()):
        if image.get("state") == "quarantined":
            yield f"image {image.get('id')} is quarantined: {image.get('reason')}"
    at_risk = [image for image in answer.get("images", ()) if image.get("at_risk")]
    if at_risk:
        yield f"{len(at_risk)} images at risk: open and not whole, their guests depend on Glance"
    if answer.get("reads_hung"):
        yield f"{answer['reads_hung']} reads hang, the oldest for {_duration(answer['oldest_read_s'])}"


def _tables(answer: Mapping[str, Any]) -> Iterator[Table]:
    reads = answer.get("reads", ())
    if reads:
        yield _reads_table(reads[:READS_SHOWN_MAX], answer.get("reads_in_flight", len(reads)))
    images = answer.get("images", ())
    at_risk = [image for image in images if image.get("at_risk")]
    if at_risk:
        yield _images_table("images at risk", at_risk)
    yield _images_table("images", [image for image in images if not image.get("at_risk")])


def _reads_table(reads: Sequence[Mapping[str, Any]], count: int) -> Table:
    from rich.table import Table

    table = Table(title=f"the oldest {len(reads)} of {count} reads that wait", title_justify="left")
    for heading in ("image", "waits for"):
        table.add_column(heading)
    for heading in ("start", "bytes", "age", "retries"):
        table.add_column(heading, justify="right")
    for read in reads:
        table.add_row(
            one_line(str(read.get("image") or "(upper folder)")),
            one_line(str(read.get("waits_for"))),
            str(read.get("start")),
            str(read.get("stop", 0) - read.get("start", 0)),
            _duration(read.get("age_s", 0)),
            str(read.get("retries")),
        )
    return table


def _images_table(title: str, images: Sequence[Mapping[str, Any]]) -> Table:
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for heading in ("image", "name", "state", "source"):
        table.add_column(heading)
    for heading in ("size", "missing", "fetched", "requests", "open"):
        table.add_column(heading, justify="right")
    for image in images:
        words = (image.get(key) for key in ("id", "name", "state", "source"))
        sizes = (image.get(key) for key in ("size_bytes", "missing_bytes", "fetched_bytes"))
        counts = (image.get(key) for key in ("requests", "open_handles"))
        table.add_row(
            # Text, not str: a name may look like markup.
            *(Text(one_line(str(word or ""))) for word in words),
            *(decimal(size) if isinstance(size, int) else "" for size in sizes),
            *(str(count) for count in counts),
        )
    return table


def _duration(seconds: float) -> str:
    for unit, unit_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit}"
    return f"{seconds:.1f} s"
