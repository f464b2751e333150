"""Tokens and passwords appear nowhere: every library at DEBUG, every repr, every traceback with its locals.

"Tokens and secrets never in logs, repr, errors, tracebacks with locals or the libraries' own debug logs."
"""

from __future__ import annotations

import io
import json
import logging
import secrets
import threading
import traceback
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from lazyimg.daemon.dump import dump_lines
from lazyimg.daemon.inflight import InFlight
from lazyimg.doctor.cloud import cloud_findings, server_date
from lazyimg.errors import ConfigError, CredentialsRefused, GlanceUnavailable, LazyImgError
from lazyimg.glance.auth import Access, Auth, KeystoneAuth, SdkLogin
from lazyimg.glance.client import GlanceClient
from lazyimg.metrics import render

# Uses sockets and openstacksdk, which takes half a second to import.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Support for InfluxDB requires"),
]

TOKEN = f"token-{secrets.token_hex(12)}"
PASSWORD = f"password-{secrets.token_hex(12)}"


class _FakeCloud(BaseHTTPRequestHandler):
    """Keystone and Glance in one; `server.mode` says what goes wrong."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/v3"):
            links = [{"rel": "self", "href": f"http://{self.headers['Host']}/v3/"}]
            self._send(200, {"version": {"id": "v3.14", "status": "stable", "links": links}})
        elif self.server.mode == "reset":  # type: ignore[attr-defined]
            self.close_connection = True
        elif self.server.mode == "401":  # type: ignore[attr-defined]
            self._send(401, {})
        else:
            self._send(200, {"images": []})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.server.mode == "wrong password":  # type: ignore[attr-defined]
            self._send(401, {"error": {"message": "no", "code": 401, "title": "Unauthorized"}})
            return
        port = self.server.server_address[1]
        endpoint = {"interface": "public", "region": "R", "region_id": "R", "url": f"http://127.0.0.1:{port}"}
        catalog = [{"type": "image", "name": "glance", "id": "1", "endpoints": [endpoint]}]
        user = {"id": "u", "name": "me", "domain": {"id": "default", "name": "Default"}}
        token = {"methods": ["password"], "user": user, "catalog": catalog, "project": user}
        token |= {"issued_at": "2020-01-01T00:00:00.0Z", "expires_at": "2099-01-01T00:00:00.0Z", "roles": []}
        self._send(201, {"token": token}, {"X-Subject-Token": TOKEN})

    def _send(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (
            {"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing: standard error is the test's."""


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """A running fake cloud, and a clouds.yaml that says how to log in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _FakeCloud)
    server.mode = "well"  # type: ignore[attr-defined]
    # A client that hangs up is part of the test.
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    auth = {"auth_url": f"http://127.0.0.1:{server.server_address[1]}/v3", "username": "me"}
    auth |= {
        "password": PASSWORD,
        "project_name": "p",
        "user_domain_id": "default",
        "project_domain_id": "default",
    }
    (tmp_path / "clouds.yaml").write_text(json.dumps({"clouds": {"here": {"auth": auth}}}))
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(tmp_path / "clouds.yaml"))
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that any logger says at DEBUG."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setLevel(logging.DEBUG)
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield text
    root.removeHandler(handler)
    root.setLevel(level)


def assert_no_secret(*texts: str) -> None:
    """Fail if a secret is in a text."""
    for text in texts:
        assert TOKEN not in text
        assert PASSWORD not in text


def with_locals(exc: BaseException) -> str:
    """Return the traceback with each frame's locals, the most that any tool prints."""
    return "".join(traceback.TracebackException.from_exception(exc, capture_locals=True).format())


async def _use(auth: Auth) -> LazyImgError | None:
    """Log in, list and read a range; return what was raised."""
    client = GlanceClient(
        auth, connect_timeout_s=5, first_byte_timeout_s=5, between_bytes_timeout_s=5, connections_max=2
    )
    async with aclosing(client):
        try:
            await client.list_images()
            async with client.open_range("x", 0, 1, size_bytes=2):
                pass
        except LazyImgError as exc:
            return exc
    return None


@pytest.mark.parametrize("mode", ["well", "reset", "401", "wrong password", "glance down"])
@pytest.mark.parametrize("are_loggers_forced", [False, True], ids=["as set", "forced to DEBUG"])
async def test_no_secret_is_written(
    cloud: ThreadingHTTPServer, log: io.StringIO, mode: str, are_loggers_forced: bool
) -> None:
    """Whatever goes wrong, with the loggers as we set them or forced back to DEBUG by somebody."""
    cloud.mode = mode  # type: ignore[attr-defined]
    auth = KeystoneAuth("here")
    forced = _force_debug() if are_loggers_forced else {}
    try:
        if mode == "glance down":
            access = await auth.access()
            error = await _use(_Another(Access(("http://127.0.0.1:9",), access.headers)))
        else:
            error = await _use(auth)
    finally:
        for logger, level in forced.items():
            logger.setLevel(level)
    assert error is not None
    assert isinstance(error, CredentialsRefused if mode == "wrong password" else GlanceUnavailable)
    assert_no_secret(log.getvalue(), str(error), repr(error), with_locals(error))
    # The frames of the HTTP libraries may hold the request as it was sent.
    assert error.__cause__ is None or error.__cause__.__traceback__ is None
    assert (error.__cause__ is not None) == (mode in ("reset", "wrong password", "glance down"))


@pytest.mark.parametrize("spoiler", ["\n", "\x01", "\u00e9", "\u20ac", " "])
async def test_token_that_http_cannot_carry_is_not_quoted(
    cloud: ThreadingHTTPServer, log: io.StringIO, spoiler: str
) -> None:
    """The libraries refuse such a header by printing it."""
    endpoint = f"http://127.0.0.1:{cloud.server_address[1]}"
    error = await _use(_Another(Access((endpoint,), {"X-Auth-Token": f"{TOKEN}{spoiler}"})))
    assert isinstance(error, GlanceUnavailable)
    assert_no_secret(log.getvalue(), str(error), repr(error), with_locals(error))


class _Another:
    """Always the same access."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def access(self) -> Access:
        """Return it."""
        return self._access

    async def renew(self, refused: Access) -> Access:
        """Return it again."""
        return refused


def _force_debug() -> dict[logging.Logger, int]:
    loggers = [
        logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)
    ]
    levels = {logger: logger.level for logger in loggers}
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    return levels


async def test_no_repr_shows_a_secret(cloud: ThreadingHTTPServer) -> None:
    """Objects of ours that hold secrets do not print them."""
    auth = KeystoneAuth("here")
    access = await auth.access()
    assert access.headers["X-Auth-Token"] == TOKEN
    client = GlanceClient(
        auth, connect_timeout_s=5, first_byte_timeout_s=5, between_bytes_timeout_s=5, connections_max=2
    )
    assert_no_secret(repr(access), repr(auth), repr(client), repr(SdkLogin("here")), str(access))


def test_unreadable_clouds_file_shows_nothing_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: io.StringIO
) -> None:
    """A YAML error quotes its line; ours does not, nor does its traceback."""
    path = tmp_path / "clouds.yaml"
    path.write_text(f"clouds:\n  here: {{auth: {{password: {PASSWORD}: [}}\n")
    monkeypatch.setenv("OS_CLIENT_CONFIG_FILE", str(path))
    with pytest.raises(ConfigError) as caught:
        SdkLogin("here")()
    assert_no_secret(str(caught.value), repr(caught.value), with_locals(caught.value), log.getvalue())


@pytest.mark.parametrize("mode", ["well", "reset", "401", "wrong password"])
async def test_diagnosis_shows_no_secret(cloud: ThreadingHTTPServer, log: io.StringIO, mode: str) -> None:
    """What doctor, status, metrics and a dump say while a token is in use, or refused, does not have it."""
    cloud.mode = mode  # type: ignore[attr-defined]
    auth = KeystoneAuth("here")
    client = GlanceClient(
        auth, connect_timeout_s=5, first_byte_timeout_s=5, between_bytes_timeout_s=5, connections_max=2
    )
    async with aclosing(client):
        findings = [one async for one in cloud_findings(auth, client, server_date=server_date)]
        glance = asdict(client.statistics())
        dump = list(dump_lines(InFlight({})))
    assert findings[0].check == "credentials"
    page = render({"images": [], "glance": glance})
    assert_no_secret(repr(findings), json.dumps(glance), page.decode(), "\n".join(dump), log.getvalue())
