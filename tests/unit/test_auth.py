"""Access: one renewal for all who wait, a valid token is never given up, Keystone is not pressed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import lazyimg.glance.auth as auth_module
from lazyimg.config import Config
from lazyimg.errors import ConfigError, CredentialsRefused, GlanceUnavailable, LazyImgError
from lazyimg.glance.auth import Access, KeystoneAuth, NoAuth, base_url, make_auth, without_frames

HOUR_S = 3600.0


class FakeKeystone:
    """A login that counts, and fails while `failure` is set; the wall clock moves with `now_s`."""

    def __init__(self) -> None:
        self.logins = 0
        self.failure: LazyImgError | None = None
        self.now_s = 1_000_000.0
        self.lifetime_s = HOUR_S
        self.gate: threading.Event | None = None

    def __call__(self) -> Access:
        self.logins += 1
        if self.gate is not None:
            assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        headers = {"X-Auth-Token": f"token {self.logins}"}
        return Access(("http://glance",), headers, self.now_s, self.now_s + self.lifetime_s)

    def auth(self) -> KeystoneAuth:
        """Return the KeystoneAuth under test."""
        return KeystoneAuth("here", login=self, wall_clock=lambda: self.now_s)


@pytest.fixture
def keystone() -> FakeKeystone:
    """A Keystone that works."""
    return FakeKeystone()


def token(access: Access) -> str:
    """Return the token."""
    return access.headers["X-Auth-Token"]


async def test_first_access_logs_in_and_the_next_does_not(keystone: FakeKeystone) -> None:
    """A token is kept."""
    auth = keystone.auth()
    assert await auth.access() is await auth.access()
    assert keystone.logins == 1


@pytest.mark.parametrize("method", ["access", "renew"])
async def test_one_login_for_all_who_wait(keystone: FakeKeystone, method: str) -> None:
    """Fifty callers at once, at the start or after a 401, cost one login."""
    auth = keystone.auth()
    refused = await auth.access() if method == "renew" else None
    logins_before = keystone.logins
    keystone.gate = threading.Event()
    got: list[Access] = []

    async def ask() -> None:
        got.append(await auth.renew(refused) if refused else await auth.access())

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        keystone.gate.set()
    assert keystone.logins == logins_before + 1
    assert len({token(access) for access in got}) == 1
    assert got[0] is not refused


async def test_waiters_share_a_failed_login(keystone: FakeKeystone) -> None:
    """When the login fails, those who waited for it fail with it, each with an error of its own."""
    auth = keystone.auth()
    keystone.failure = GlanceUnavailable("Keystone is down", retry_after_s=3)
    keystone.gate = threading.Event()
    errors: list[GlanceUnavailable] = []

    async def ask() -> None:
        with pytest.raises(GlanceUnavailable, match="is down") as caught:
            await auth.access()
        errors.append(caught.value)

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        keystone.gate.set()
    assert keystone.logins == 1
    assert len({id(error) for error in errors}) == 20
    assert {error.retry_after_s for error in errors} == {3}


async def test_cancelled_waiter_harms_nobody(keystone: FakeKeystone) -> None:
    """When the caller that logs in is cancelled, the next one logs in instead."""
    auth = keystone.auth()
    keystone.gate = threading.Event()
    first, got = trio.CancelScope(), []

    async def ask(scope: trio.CancelScope) -> None:
        with scope:
            got.append(await auth.access())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask, first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(ask, trio.CancelScope())
        await trio.testing.wait_all_tasks_blocked()
        first.cancel()
        await trio.testing.wait_all_tasks_blocked()
        keystone.gate.set()
    assert len(got) == 1
    assert first.cancelled_caught


async def test_token_is_renewed_ahead_of_its_end(keystone: FakeKeystone) -> None:
    """Not while it is fresh, but at least two minutes before it ends."""
    auth = keystone.auth()
    first = await auth.access()
    keystone.now_s += HOUR_S - 200
    assert await auth.access() is first
    keystone.now_s += 70
    assert token(await auth.access()) == "token 2"


async def test_short_lived_token_is_renewed_at_half_its_life(keystone: FakeKeystone) -> None:
    """A token of two minutes is not renewed at each call."""
    keystone.lifetime_s = 120
    auth = keystone.auth()
    first = await auth.access()
    keystone.now_s += 50
    assert await auth.access() is first
    keystone.now_s += 15
    assert await auth.access() is not first


async def test_failed_renewal_ahead_keeps_the_old_token(
    keystone: FakeKeystone, expected_warnings: Callable[..., None]
) -> None:
    """Keystone down while the token is valid: it serves on, Keystone is asked now and then, until it ends."""
    expected_warnings("the old one serves on")
    auth = keystone.auth()
    first = await auth.access()
    keystone.now_s += HOUR_S - 60
    keystone.failure = GlanceUnavailable("Keystone is down")
    for _ in range(10):
        assert await auth.access() is first
    assert keystone.logins == 2
    keystone.now_s += 61
    with pytest.raises(GlanceUnavailable):
        await auth.access()


async def test_others_do_not_wait_for_a_renewal_ahead(keystone: FakeKeystone) -> None:
    """While one call renews, the rest go on with the token that is still valid."""
    auth = keystone.auth()
    first = await auth.access()
    keystone.now_s += HOUR_S - 60
    keystone.gate = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(auth.access)
        await trio.testing.wait_all_tasks_blocked()
        assert await auth.access() is first
        keystone.gate.set()
    assert token(await auth.access()) == "token 2"


async def test_glance_that_refuses_every_token_does_not_cost_a_login_each(
    keystone: FakeKeystone, mock_clock: trio.testing.MockClock
) -> None:
    """Glance says 401 to good tokens too while it cannot reach Keystone."""
    auth = keystone.auth()
    access = await auth.renew(await auth.access())
    assert keystone.logins == 2
    for _ in range(10):
        with pytest.raises(GlanceUnavailable) as caught:
            await auth.renew(access)
    assert keystone.logins == 2
    assert caught.value.retry_after_s is not None
    # A jump, not autojump: that would not wait for the thread that logs in.
    mock_clock.jump(caught.value.retry_after_s)
    assert token(await auth.renew(access)) == "token 3"


async def test_wrong_password_is_not_hammered(
    keystone: FakeKeystone, mock_clock: trio.testing.MockClock
) -> None:
    """A refusal is repeated for a while without asking Keystone, so that no account gets locked."""
    auth = keystone.auth()
    keystone.failure = CredentialsRefused("wrong password")
    for _ in range(10):
        with pytest.raises(CredentialsRefused):
            await auth.access()
    assert keystone.logins == 1
    mock_clock.jump(auth_module.REFUSAL_RETRY_PAUSE_S)
    keystone.failure = None
    assert token(await auth.access()) == "token 2"


async def test_login_that_hangs_is_given_up(keystone: FakeKeystone) -> None:
    """A login has a time limit; the thread that hangs is not waited for."""
    auth = KeystoneAuth("here", login=keystone, login_timeout_s=0.05)
    keystone.gate = threading.Event()
    with pytest.raises(GlanceUnavailable, match=r"did not answer a login in 0\.05 s"):
        await auth.access()
    keystone.gate.set()


async def test_bare_endpoints_have_nothing_to_renew() -> None:
    """A Glance that asks for a token where none is configured: the next step is named."""
    auth = NoAuth(["http://glance:9292/v2/", "https://other"])
    access = await auth.access()
    assert access.endpoints == ("http://glance:9292", "https://other")
    with pytest.raises(GlanceUnavailable, match="--cloud"):
        await auth.renew(access)


@pytest.mark.parametrize(
    ("endpoint", "base"),
    [
        ("http://g:9292", "http://g:9292"),
        ("http://g:9292/v2/", "http://g:9292"),
        ("https://g/image/v2", "https://g/image"),
        ("https://[::1]:9292/", "https://[::1]:9292"),
    ],
)
def test_endpoint_loses_its_version(endpoint: str, base: str) -> None:
    """With or without /v2 it is the same endpoint."""
    assert base_url(endpoint) == base


@pytest.mark.parametrize(
    "endpoint", ["http://", "glance:9292", "ftp://g", "http://g?x=1", "http://g:port", "http://me:pw123@g"]
)
def test_endpoint_that_cannot_work_is_refused(endpoint: str) -> None:
    """At once, and without showing a password in it."""
    with pytest.raises(ConfigError, match="endpoint") as caught:
        base_url(endpoint)
    assert "pw123" not in str(caught.value)


def test_configuration_decides_who_we_are() -> None:
    """Endpoints need no login; else a cloud, or OS_*."""
    assert isinstance(make_auth(Config(endpoint=("http://g",))), NoAuth)
    assert isinstance(make_auth(Config(cloud="here")), KeystoneAuth)
    assert isinstance(make_auth(Config()), KeystoneAuth)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Config(endpoint=("https://g",), ca_file=Path("/nonexistent/ca.pem")), "ca_file.*No such file"),
        (Config(endpoint=("https://g",), cert_file=Path("/nonexistent/me.pem")), "cert_file.*No such file"),
        (Config(endpoint=("https://g",), key_file=Path("/me.key")), "give cert_file too"),
        (Config(cloud="here", ca_file=Path("/ca.pem")), "cacert and cert in clouds.yaml"),
        (Config(cert_file=Path("/me.pem")), "cacert and cert in clouds.yaml"),
    ],
)
def test_tls_files_that_cannot_work_are_refused_at_start(config: Config, reason: str) -> None:
    """Half of an answer, a file that is not there, or files where clouds.yaml has its own."""
    with pytest.raises(ConfigError, match=reason):
        make_auth(config)


def test_frames_are_taken_from_all_that_is_chained() -> None:
    """Causes and contexts alike, since any of them would be printed."""
    try:
        try:
            raise KeyError("inner")
        except KeyError as exc:
            raise ValueError("outer") from exc
    except ValueError as exc:
        stripped = without_frames(exc)
    assert stripped.__traceback__ is None
    assert stripped.__cause__ is not None
    assert stripped.__cause__.__traceback__ is None
