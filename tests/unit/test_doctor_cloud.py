"""The doctor's questions to Glance, and that no check that hangs or fails ends the others."""

from __future__ import annotations

import email.utils
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from image_fakes import FakeGlance, Reply

from lazyimg.config import Config
from lazyimg.core.identity import ImageRecord
from lazyimg.doctor import Finding, examination
from lazyimg.doctor.cloud import SKEW_MAX_S, cloud_findings
from lazyimg.doctor.examination import CLOUD_TIMEOUT_S, findings_of
from lazyimg.doctor.finding import ok
from lazyimg.errors import (
    CacheUnusable,
    CredentialsRefused,
    GlanceUnavailable,
    ImageForbidden,
    LazyImgError,
    RangesNotSupported,
    WholeBody,
)
from lazyimg.glance.auth import Access

NOW_S = 1.6e9


class Login:
    """Always the same access, or the same refusal; None never comes."""

    def __init__(self, outcome: Access | LazyImgError | None) -> None:
        self._outcome = outcome

    async def access(self) -> Access:
        if self._outcome is None:
            await trio.sleep_forever()
        if isinstance(self._outcome, LazyImgError):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    async def renew(self, refused: Access) -> Access:
        return await self.access()


def access(life_s: float | None = 3600) -> Access:
    return Access(("http://g",), expires_at_s=None if life_s is None else NOW_S + life_s)


class Listing(FakeGlance):
    """A Glance in memory that lists what it has."""

    async def list_images(self) -> list[ImageRecord]:
        if self.list_error is not None:
            raise self.list_error
        return list(self.records.values())


@pytest.fixture
def glance() -> Listing:
    glance = Listing()
    glance.add(1, 100_000)
    return glance


async def found_by(glance: Listing, login: Access | LazyImgError, skew_s: float = 0) -> dict[str, Finding]:
    """Return the findings by their check."""

    def server_date(url: str, _tls: object) -> str | None:
        assert url == "http://g"
        return email.utils.formatdate(NOW_S + skew_s)

    findings = cloud_findings(Login(login), glance, server_date=server_date, now_s=lambda: NOW_S)
    return {one.check: one async for one in findings}


async def test_fit_cloud_is_ok(glance: Listing) -> None:
    """Login, clock, list and a range are ok, and one byte is all that was asked for."""
    found = await found_by(glance, access())
    assert {one.state for one in found.values()} == {"ok"}
    assert list(found) == ["credentials", "clock", "Glance", "ranges"]
    ((start, stop),) = glance.ranges
    assert stop - start == 1


async def test_refused_login_ends_it(glance: Listing) -> None:
    """Without credentials nothing more is asked."""
    found = await found_by(glance, CredentialsRefused("cloud 'c': no; look at x"))
    assert [(one.check, one.state) for one in found.values()] == [("credentials", "fail")]
    assert not glance.ranges


@pytest.mark.parametrize(("life_s", "state"), [(60, "warn"), (-1000, "warn"), (None, "ok"), (86400, "ok")])
async def test_short_token_is_warned_of(glance: Listing, life_s: float | None, state: str) -> None:
    """A token that ends soon, or has ended by this machine's clock, is told."""
    assert (await found_by(glance, access(life_s)))["credentials"].state == state


@pytest.mark.parametrize(
    ("skew_s", "state", "seen"),
    [(0, "ok", "0 s"), (SKEW_MAX_S + 5, "warn", "behind"), (-SKEW_MAX_S - 5, "warn", "ahead of")],
)
async def test_clocks_are_compared(glance: Listing, skew_s: float, state: str, seen: str) -> None:
    """A clock that differs from Glance's is told, and in which direction."""
    clock = (await found_by(glance, access(), skew_s))["clock"]
    assert (clock.state, seen in clock.seen) == (state, True)


async def test_glance_that_does_not_answer_fails(glance: Listing) -> None:
    """Where no list comes no range is asked."""
    glance.list_error = GlanceUnavailable("list of images: refused")
    found = await found_by(glance, access())
    assert (found["Glance"].state, "ranges" in found) == ("fail", False)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (RangesNotSupported("no"), "warn"),
        (WholeBody("all of it"), "warn"),
        (ImageForbidden("no"), "fail"),
        (GlanceUnavailable("502"), "fail"),
    ],
)
async def test_ranges_are_tried(glance: Listing, error: LazyImgError, state: str) -> None:
    """A store without ranges, a body that comes whole, forbidden bytes and a failing store are told apart."""
    glance.always = Reply(error=error)
    ranges = (await found_by(glance, access()))["ranges"]
    assert (ranges.state, ranges.advice is not None) == (state, True)


async def test_more_bytes_than_asked_fail(glance: Listing, monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers another range would give guests wrong bytes."""

    @asynccontextmanager
    async def open_range(*_: object, **__: object) -> AsyncIterator[AsyncIterator[bytes]]:
        async def body() -> AsyncIterator[bytes]:
            yield b"xx"

        yield body()

    monkeypatch.setattr(glance, "open_range", open_range)
    assert (await found_by(glance, access()))["ranges"].state == "fail"


async def test_glance_without_images_is_warned_of() -> None:
    """Ranges cannot be tried where there is no image."""
    assert (await found_by(Listing(), access()))["ranges"].state == "warn"


async def test_failing_check_is_a_finding() -> None:
    """A check that raises what the world can do is told, and the next is made."""

    def broken() -> Finding:
        raise OSError(5, "Input/output error")

    def unusable() -> Finding:
        raise CacheUnusable("cache c: broken")

    checks = [("a", broken), ("b", unusable), ("c", lambda: ok("c", "well"))]
    found = [one async for one in findings_of(checks)]
    assert [(one.check, one.state) for one in found] == [("a", "fail"), ("b", "fail"), ("c", "ok")]


async def test_hanging_check_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """[I5] A check that hangs is left behind after a limit, and the next is made."""
    monkeypatch.setattr(examination, "CHECK_TIMEOUT_S", 0.05)
    release = threading.Event()

    def hangs() -> Finding:
        release.wait(60)
        return ok("a", "too late")

    found = []
    async for one in findings_of([("a", hangs), ("b", lambda: ok("b", "well"))]):
        found.append(one)
        # So short a limit is for what hangs: a thread that only has to begin may take longer on a busy machine.
        monkeypatch.setattr(examination, "CHECK_TIMEOUT_S", 60)
    release.set()
    assert [(one.check, one.state) for one in found] == [("a", "fail"), ("b", "ok")]


async def test_silent_cloud_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.abc.Clock
) -> None:
    """[I5] A Keystone that never answers costs the doctor a limit, and is told."""
    monkeypatch.setattr(examination, "make_auth", lambda _config: Login(None))
    told: list[Finding] = []
    began_s = trio.current_time()
    await examination._examine_cloud(Config(endpoint=("http://g",)), told.append)
    assert [(one.check, one.state) for one in told] == [("Glance", "fail")]
    assert trio.current_time() - began_s == CLOUD_TIMEOUT_S
