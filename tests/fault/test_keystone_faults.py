"""Keystone fails while guests read: seen through a mount that logs in with openstacksdk, over TLS with a cloud's CA.

Expected sequence: the mount logs in and reads.  Glance refuses the token while Keystone is away: a reader waits, status
says why nobody can log in, what is cached is read on.  Keystone is back and Glance goes on refusing: still a passing
fault.  Glance takes the new token: the reader has its bytes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from certificates import Authority
from real_mount import Mount, read_direct, wait_until
from served_glance import MIB, ServedGlance
from wire import wire

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow


class _Handler(BaseHTTPRequestHandler):
    """Answers a login with a password, as Keystone's API v3 does."""

    protocol_version = "HTTP/1.1"
    server: Keystone

    def do_GET(self) -> None:
        links = [{"rel": "self", "href": f"{self.server.public_url}/v3/"}]
        self._send(200, {"version": {"id": "v3.14", "status": "stable", "links": links}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if not self.server.is_away:
            self.server.logins += 1
        endpoint = {"interface": "public", "region": "R", "region_id": "R", "url": self.server.glance_url}
        catalog = [{"type": "image", "name": "glance", "id": "1", "endpoints": [endpoint]}]
        user = {"id": "u", "name": "me", "domain": {"id": "default", "name": "Default"}}
        token = {"methods": ["password"], "user": user, "catalog": catalog, "project": user}
        token |= {"issued_at": "2020-01-01T00:00:00.0Z", "expires_at": "2099-01-01T00:00:00.0Z", "roles": []}
        self._send(201, {"token": token}, {"X-Subject-Token": f"token-{self.server.logins}"})

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        if self.server.is_away:
            self.close_connection = True
            return
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: standard error is the test's."""


class Keystone(ThreadingHTTPServer):
    """Gives out tokens, unless it is away."""

    def __init__(self, glance_url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.glance_url = glance_url
        self.public_url = ""
        self.is_away = False
        self.logins = 0

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is part of the test."""


@pytest.fixture
def keystone() -> Iterator[Keystone]:
    server = Keystone("")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_keystone_goes_away_under_a_reader(
    make_mount: Callable[..., Mount],
    glance: ServedGlance,
    keystone: Keystone,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """[I1] A token that is refused while Keystone is away makes a reader wait, and no more."""
    authority = Authority(tmp_path / "authority")
    context = authority.server_context(authority.sign())
    image = glance.add(8 * MIB)
    glance_port = int(glance.url.rpartition(":")[2])
    with wire(glance_port, context) as to_glance, wire(keystone.server_address[1], context) as to_keystone:
        keystone.glance_url, keystone.public_url = to_glance.url, to_keystone.url
        auth = {"auth_url": f"{to_keystone.url}/v3", "username": "me", "password": "p", "project_name": "p"}
        auth |= {"user_domain_id": "default", "project_domain_id": "default"}
        clouds = {"clouds": {"here": {"auth": auth, "cacert": str(authority.ca_file)}}}
        (tmp_path / "clouds.yaml").write_text(json.dumps(clouds))
        monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
        mount = make_mount("", cloud="here")
        path = mount.path_of(image)
        wait_until(path.exists, "the first login", 30)
        assert read_direct(path, 0, MIB) == image.content[:MIB]
        logins = keystone.logins

        keystone.is_away = True
        glance.fail(FaultRule("status", "any", status=401))
        read = mount.read_later(image, 5 * MIB, MIB)
        wait_until(lambda: mount.status()["glance"]["login_error"], "the failed login", 60)
        assert "'here'" in mount.status()["glance"]["login_error"]
        assert mount.status()["glance"]["is_down"]
        assert read_direct(path, 0, MIB) == image.content[:MIB], "what is here is read meanwhile"
        assert not read.done()

        keystone.is_away = False
        wait_until(lambda: keystone.logins > logins, "another login", 60)
        assert not read.done()

        glance.fail()
        assert read.result(60) == image.content[5 * MIB : 6 * MIB]
        wait_until(lambda: not mount.status()["glance"]["is_down"], "all is well", 30)
        assert mount.status()["glance"]["login_error"] is None
