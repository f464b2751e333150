"""What the daemon does with one image: prefetch, evict, verify."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lazyimg.cli.app import EXIT_CODES, ControlFlag, ImageArgument, app, make_client, one_line
from lazyimg.errors import LazyImgError

if TYPE_CHECKING:
    from lazyimg.control import Progress


@app.command(epilog=EXIT_CODES)
def prefetch(image: ImageArgument, control: ControlFlag = None) -> None:
    """Fetch all of IMAGE now."""
    _watch(f"prefetch {image}", make_client(control).prefetch(image))


@app.command(epilog=EXIT_CODES)
def evict(image: ImageArgument, control: ControlFlag = None) -> None:
    """Drop what is cached of IMAGE; refused while it is open."""
    freed_bytes = make_client(control).evict(image)
    print(f"{one_line(image)}: {freed_bytes} bytes freed")


@app.command(epilog=EXIT_CODES)
def verify(image: ImageArgument, control: ControlFlag = None) -> None:
    """Check what is cached of IMAGE; exit code 1 if anything is damaged."""
    last = _watch(f"verify {image}", make_client(control).verify(image))
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
