"""Logging in to a real Keystone: every way in, every way to be refused, and a token that dies."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from glance_under_test import make_client
from keystone_admin import KeystoneAdmin, Member, password_auth
from real_servers import RealGlance

from lazyimg.errors import ConfigError, CredentialsRefused, GlanceUnavailable
from lazyimg.glance.auth import KeystoneAuth

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Support for InfluxDB requires"),
]

Clouds = Callable[..., None]


async def list_as(cloud: str | None) -> None:
    """Log in and list."""
    async with aclosing(make_client(KeystoneAuth(cloud))) as client:
        await client.list_images()


@pytest.mark.parametrize("interface", ["public", "internal"])
async def test_password_of_a_cloud(
    keystone: KeystoneAdmin, member: Member, keystone_glance: RealGlance, clouds: Clouds, interface: str
) -> None:
    """The endpoint is that of the cloud's interface, with or without /v2 in the catalog."""
    clouds(keystone.url, password_auth(member), interface=interface)
    access = await KeystoneAuth("here").access()
    assert access.endpoints == (keystone_glance.url,)
    assert access.expires_at_s is not None
    assert access.expires_at_s - access.issued_at_s > 600
    await list_as("here")


async def test_application_credential(keystone: KeystoneAdmin, member: Member, clouds: Clouds) -> None:
    """An application credential logs in; its secret being wrong is told."""
    id_, secret = keystone.add_application_credential(member)
    auth = {"application_credential_id": id_, "application_credential_secret": secret}
    clouds(keystone.url, auth, auth_type="v3applicationcredential")
    await list_as("here")
    auth["application_credential_secret"] = "no-" + secret
    clouds(keystone.url, auth, auth_type="v3applicationcredential")
    with pytest.raises(CredentialsRefused, match="'here'"):
        await list_as("here")


async def test_credentials_of_the_environment(
    keystone: KeystoneAdmin, member: Member, clouds: Clouds, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a cloud's name OS_* tell who we are."""
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("OS_AUTH_URL", f"{keystone.url}/v3")
    for key, value in password_auth(member).items():
        monkeypatch.setenv(f"OS_{key.upper()}", value)
    await list_as(None)


@pytest.mark.parametrize("wrong", ["username", "password", "project_name"])
async def test_wrong_credentials_are_refused(
    keystone: KeystoneAdmin, member: Member, clouds: Clouds, wrong: str
) -> None:
    """Keystone's own word is final, and the secret is not in ours."""
    auth = password_auth(member) | {wrong: "not-this-one"}
    clouds(keystone.url, auth)
    with pytest.raises(CredentialsRefused) as caught:
        await list_as("here")
    assert auth["password"] not in str(caught.value)


async def test_region_without_glance_is_a_passing_fault(
    keystone: KeystoneAdmin, member: Member, clouds: Clouds, caplog: pytest.LogCaptureFixture
) -> None:
    """The catalog may be completed while we run."""
    clouds(keystone.url, password_auth(member), region_name="Nowhere")
    with pytest.raises(GlanceUnavailable, match="Nowhere"):
        await list_as("here")


async def test_revoked_token_is_renewed_once(
    keystone: KeystoneAdmin, member: Member, keystone_glance: RealGlance, clouds: Clouds
) -> None:
    """A call whose token was revoked logs in again and succeeds without its caller noticing."""
    clouds(keystone.url, password_auth(member))
    auth = KeystoneAuth("here")
    async with aclosing(make_client(auth)) as client:
        await client.list_images()
        before = await auth.access()
        keystone.revoke(before.headers["X-Auth-Token"])
        await client.list_images()
        after = await auth.access()
    assert after.headers != before.headers


async def test_keystone_down_is_a_passing_fault(clouds: Clouds) -> None:
    """Nobody answers at the auth_url: that says nothing about the password."""
    clouds("http://127.0.0.1:9", {"username": "u", "password": "p", "project_name": "p"})
    with pytest.raises(GlanceUnavailable, match="'here'"):
        await list_as("here")


async def test_unknown_cloud_is_named(clouds: Clouds) -> None:
    """A cloud that clouds.yaml does not have is a mistake of the configuration."""
    clouds("http://127.0.0.1:9", {"username": "u", "password": "p"})
    with pytest.raises(ConfigError, match=r"elsewhere.*--cloud"):
        await list_as("elsewhere")


async def test_no_credentials_at_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither clouds.yaml nor OS_*: told with the next step."""
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.CRITICAL, "openstack")
    with pytest.raises(ConfigError, match="--endpoint"):
        await list_as(None)


async def test_broken_clouds_file_does_not_show_its_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The error names the cloud, not the line that is wrong."""
    path = tmp_path / "clouds.yaml"
    path.write_text("clouds:\n  here:\n    auth: {password: hidden-secret: [}\n")
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError) as caught:
        await list_as("here")
    assert "hidden-secret" not in str(caught.value)
