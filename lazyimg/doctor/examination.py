"""All checks in their order, each within a time limit and none able to end the others."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from itertools import chain
from pathlib import Path

import trio

from lazyimg.config import Config
from lazyimg.doctor.cachedisk import cache_checks
from lazyimg.doctor.cloud import cloud_findings, server_date
from lazyimg.doctor.finding import Finding, fail
from lazyimg.doctor.machine import Machine, machine_checks
from lazyimg.doctor.mounted import daemon_checks
from lazyimg.errors import LazyImgError
from lazyimg.glance.auth import make_auth
from lazyimg.glance.configured import make_glance

# Of one check.  What hangs is left behind in its thread, which ends with this process.
CHECK_TIMEOUT_S = 20.0
# Of all that is asked of Glance: a login, a list, a record and a byte.
CLOUD_TIMEOUT_S = 60.0

Checks = Iterable[tuple[str, Callable[[], Finding]]]


def examine(config: Config, mountpoint: Path | None, tell: Callable[[Finding], None]) -> None:
    """Make all checks, telling each finding as it comes."""
    trio.run(_examine, config, mountpoint, tell)


async def _examine(config: Config, mountpoint: Path | None, tell: Callable[[Finding], None]) -> None:
    checks = chain(
        machine_checks(Machine.this(), allow_other=config.allow_other, mountpoint=mountpoint),
        cache_checks(config.cache_dir, config.cache_free_min),
        daemon_checks(config.control),
    )
    async with aclosing(findings_of(checks)) as findings:
        async for finding in findings:
            tell(finding)
    await _examine_cloud(config, tell)


async def findings_of(checks: Checks) -> AsyncGenerator[Finding, None]:
    """Make checks that block, in threads; one that fails or hangs is a finding too."""
    for name, check in checks:
        with trio.move_on_after(CHECK_TIMEOUT_S) as scope:
            try:
                finding = await trio.to_thread.run_sync(check, abandon_on_cancel=True)
            except (OSError, LazyImgError) as exc:
                finding = fail(name, f"could not be looked at: {exc}", "mend that, then ask again")
        if scope.cancelled_caught:
            finding = fail(name, f"nothing came within {CHECK_TIMEOUT_S:g} s", "find out what hangs there")
        yield finding


async def _examine_cloud(config: Config, tell: Callable[[Finding], None]) -> None:
    with trio.move_on_after(CLOUD_TIMEOUT_S) as scope:
        try:
            auth = make_auth(config)
            async with (
                aclosing(make_glance(config, auth)) as glance,
                aclosing(cloud_findings(auth, glance, server_date=server_date)) as findings,
            ):
                async for finding in findings:
                    tell(finding)
        except LazyImgError as exc:
            tell(fail("Glance", str(exc), "see docs/configuration.md for endpoint and cloud"))
    if scope.cancelled_caught:
        tell(
            fail(
                "Glance",
                f"nothing came within {CLOUD_TIMEOUT_S:g} s",
                "look at the way to it, and at its log",
            )
        )
