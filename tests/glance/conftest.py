"""The servers under one contract: the embedded Glance, with ranges and without, and the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from glance_under_test import Server, make_client
from keystone_admin import KeystoneAdmin, Member, password_auth, write_clouds
from real_servers import RealGlance, run_glance, run_keystone
from setup_real import is_ready

from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.glance.auth import Auth, KeystoneAuth, NoAuth


@pytest.fixture(scope="session")
def real_software() -> None:
    """Skip where `setup_real.py` could not install the real Glance."""
    if not is_ready():
        pytest.skip("the real Glance and Keystone are missing here; `make test` installs them")


@pytest.fixture(scope="session")
def real_glance(real_software: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealGlance]:
    """A real Glance that asks for no token."""
    with run_glance(tmp_path_factory.mktemp("glance")) as glance:
        yield glance


@pytest.fixture(scope="session")
def keystone(real_software: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeystoneAdmin]:
    """A real Keystone."""
    with run_keystone(tmp_path_factory.mktemp("real") / "keystone") as url:
        yield KeystoneAdmin(url)


@pytest.fixture(scope="session")
def keystone_glance(
    keystone: KeystoneAdmin, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RealGlance]:
    """A real Glance that asks that Keystone about every token, and is in its catalog."""
    with run_glance(tmp_path_factory.mktemp("glance"), keystone_url=keystone.url) as glance:
        keystone.add_image_endpoint(glance.url)
        yield glance


@pytest.fixture
def member(keystone: KeystoneAdmin, keystone_glance: RealGlance) -> Member:
    """Somebody new."""
    return keystone.add_member()


@pytest.fixture
def clouds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return `clouds(auth_url, auth, **more)`: makes the only clouds.yaml that openstacksdk sees."""
    path = tmp_path / "clouds.yaml"
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(path))
    return partial(write_clouds, path)


@pytest.fixture
async def embedded(tmp_path: Path, nursery: trio.Nursery) -> tuple[EmbeddedGlance, str]:
    """An embedded Glance and its URL."""
    glance = EmbeddedGlance(tmp_path / "glance")
    return glance, await nursery.start(partial(serve, glance))


@pytest.fixture(params=["embedded", "embedded without ranges", "real", "real with Keystone"])
def backend(request: pytest.FixtureRequest) -> tuple[str, Any]:
    """Which server, and what it runs on."""
    match request.param:
        case "real":
            return request.param, request.getfixturevalue("real_glance")
        case "real with Keystone":
            keystone = request.getfixturevalue("keystone")
            glance = request.getfixturevalue("keystone_glance")
            member = request.getfixturevalue("member")
            request.getfixturevalue("clouds")(keystone.url, password_auth(member))
            token = keystone.token_of(member.name, member.password, member.project)
            return request.param, (glance, token)
    return request.param, None


@pytest.fixture
async def server(backend: tuple[str, Any], embedded: tuple[EmbeddedGlance, str]) -> AsyncIterator[Server]:
    """The server, its bare HTTP and our client."""
    name, made = backend
    headers: dict[str, str] = {}
    auth: Auth
    if name.startswith("embedded"):
        glance, url = embedded
        glance.no_ranges = name.endswith("without ranges")
        auth, data_path = NoAuth([url]), glance.images.data_path
    elif name == "real":
        url, auth, data_path = made.url, NoAuth([made.url]), made.data.joinpath
    else:
        real, headers["X-Auth-Token"] = made
        url, auth, data_path = real.url, KeystoneAuth("here"), real.data.joinpath
    async with (
        httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as http,
        aclosing(make_client(auth)) as client,
    ):
        yield Server(client, http, data_path, not name.endswith("without ranges"), name == "real")
