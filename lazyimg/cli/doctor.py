"""`lazyimg doctor`: is all here that lazyimg needs?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    one_line,
)
from lazyimg.errors import LazyImgError

if TYPE_CHECKING:
    from lazyimg.doctor import Finding


@app.command(epilog=EXIT_CODES)
def doctor(
    mountpoint: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where it is, or will be, mounted.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    config: ConfigFlag = None,
    endpoint: EndpointFlag = None,
    cloud: CloudFlag = None,
    cache_dir: CacheDirFlag = None,
    control: ControlFlag = None,
) -> None:
    """Look whether this machine, its Glance and its daemon are fit, and say what to do; needs no daemon."""
    settings = load_settings(config, given_flags(endpoint, cloud, cache_dir, control))
    from lazyimg.doctor import examine

    findings: list[Finding] = []

    def tell(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            advice = f" → {finding.advice}" if finding.advice else ""
            print(one_line(f"{finding.state:4} {finding.check}: {finding.seen}{advice}"), flush=True)

    examine(settings, mountpoint, tell)
    if as_json:
        print(json.dumps({"findings": [asdict(finding) for finding in findings]}))
    failed = [finding.check for finding in findings if finding.state == "fail"]
    if failed:
        raise LazyImgError(f"doctor: not fit: {', '.join(failed)}; do what is said there")
