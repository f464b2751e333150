"""nginx as a stand-in for Glance's image API and, for the same bytes, as a plain web server.

All contenders of a benchmark read from it through the same link, and it counts the bytes they took.  It
answers ranges with 206 and exact bytes like Glance's file store; there is no authentication.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import machine

from lazyimg.core.identity import ImageRecord

PORT = 8080
MODULES_DIR = Path("/usr/lib/nginx/modules")
LOOPBACK = "127.0.0.1"
# A subnet of a veth pair between two namespaces of this benchmark; nobody else can see it.
CLIENT_ADDRESS = "10.254.7.1"
SERVER_ADDRESS = "10.254.7.2"
TBF = ("tbf", "rate", "1gbit", "burst", "256kb", "latency", "50ms")
LATENCY_S = 0.002
# The server's memory of what it sent is one line per request: "BYTES METHOD URI".
LOG_FORMAT = "$body_bytes_sent $request_method $request_uri"


@dataclass(frozen=True)
class ServedImage:
    """An image and the file its bytes come from; None where nobody will ask for them."""

    record: ImageRecord
    path: Path | None


def served_image(path: Path, image_id: str, name: str, disk_format: str = "raw") -> ServedImage:
    """Return an image of a file's bytes; no hash, as for images whose bytes Glance never saw.

    Its checksum tells it from others, and is not that of the bytes: nobody has to read them for it.
    """
    record = ImageRecord(
        id=image_id,
        name=name,
        status="active",
        size_bytes=path.stat().st_size,
        disk_format=disk_format,
        container_format="bare",
        checksum=image_id.replace("-", ""),
        created_at="2025-01-01T00:00:00Z",
    )
    return ServedImage(record, path)


@dataclass(frozen=True)
class NginxGlance:
    """A running server."""

    endpoint: str
    access_log: Path

    def image_url(self, image: ServedImage) -> str:
        """Return the plain URL of an image's bytes, for programs that know nothing of Glance."""
        return f"{self.plain_url}{image.record.id}.raw"

    @property
    def plain_url(self) -> str:
        """The folder of all images, with an index as web servers make it."""
        return f"{self.endpoint}/plain/"

    def wait_sent(self) -> None:
        """Return when no request is being answered any more: only then has each its line in the log."""
        machine.wait_until(self._is_idle, "nginx still sending: a contender holds a request open")

    def _is_idle(self) -> bool:
        with urllib.request.urlopen(f"{self.endpoint}/server-status", timeout=5) as response:
            words = response.read().decode()
        found = re.search(r"Writing: (\d+)", words)
        # This question itself is the one being answered.
        return found is not None and int(found[1]) <= 1

    def sent(self) -> tuple[int, int]:
        """Return bytes of image data and number of requests for it since the server started."""
        lines = self.access_log.read_text().splitlines()
        image_lines = [line for line in lines if line.endswith("/file") or "/plain/" in line]
        return sum(int(line.partition(" ")[0]) for line in image_lines), len(image_lines)


@contextlib.contextmanager
def serve_images(images: Sequence[ServedImage], folder: Path, *, is_shaped: bool) -> Iterator[NginxGlance]:
    """Serve inside the block: on loopback, or 2 ms and 1 Gbit/s away in a namespace of the server's own."""
    folder.mkdir()
    _write_files(images, folder)
    address = SERVER_ADDRESS if is_shaped else LOOPBACK
    config = folder / "nginx.conf"
    config.write_text(_config(images, folder, address, latency_s=LATENCY_S if is_shaped else 0))
    nginx = ["nginx", "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")]
    # The shell waits for the line that says that the link is there; it then becomes nginx.
    shell = ["unshare", "--net"] * is_shaped + ["sh", "-c", 'echo; read _ && exec "$@"', "sh", *nginx]
    process = subprocess.Popen(shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin
    assert process.stdout
    try:
        process.stdout.readline()
        if is_shaped:
            _join_by_veth(process.pid)
        process.stdin.write(b"go\n")
        process.stdin.close()
        server = NginxGlance(f"http://{address}:{PORT}", folder / "access.log")
        machine.wait_until(lambda: _answers(server, process), f"nginx on {server.endpoint}")
        yield server
    finally:
        process.terminate()
        process.wait()


def _answers(server: NginxGlance, process: subprocess.Popen[bytes]) -> bool:
    if process.poll() is not None:
        log = server.access_log.with_name("error.log")
        sys.exit(f"nginx ended: {log.read_text() if log.exists() else 'no error log'}")
    try:
        with urllib.request.urlopen(f"{server.endpoint}/server-status", timeout=5):
            return True
    except OSError:
        return False


def _join_by_veth(server_pid: int) -> None:
    inside = ("nsenter", "--net", "--target", str(server_pid))
    machine.run(
        "ip", "link", "add", "client", "type", "veth", "peer", "name", "server", "netns", str(server_pid)
    )
    machine.run("ip", "address", "add", f"{CLIENT_ADDRESS}/24", "dev", "client")
    machine.run("ip", "link", "set", "client", "up")
    machine.run(*inside, "ip", "address", "add", f"{SERVER_ADDRESS}/24", "dev", "server")
    machine.run(*inside, "ip", "link", "set", "server", "up")
    machine.run(*inside, "tc", "qdisc", "add", "dev", "server", "root", *TBF)


def _write_files(images: Sequence[ServedImage], folder: Path) -> None:
    plain = folder / "plain"
    plain.mkdir()
    for image in images:
        (folder / f"{image.record.id}.json").write_text(json.dumps(_glance_json(image.record)))
        if image.path is not None:
            os.symlink(image.path, plain / f"{image.record.id}.raw")
    listing = {
        "images": [_glance_json(image.record) for image in images],
        "first": "/v2/images",
        "schema": "/v2/schemas/images",
    }
    (folder / "images.json").write_text(json.dumps(listing))


def _glance_json(record: ImageRecord) -> dict[str, object]:
    """Return the record as Glance's "Show image" gives it (Image API ref)."""
    return {
        "id": record.id,
        "name": record.name,
        "status": record.status,
        "size": record.size_bytes,
        "virtual_size": record.virtual_size_bytes,
        "disk_format": record.disk_format,
        "container_format": record.container_format,
        "checksum": record.checksum,
        "os_hash_algo": record.os_hash_algo,
        "os_hash_value": record.os_hash_value,
        "visibility": "public",
        "os_hidden": False,
        "protected": False,
        "owner": None,
        "min_disk": record.min_disk_gib,
        "min_ram": 0,
        "tags": [],
        "created_at": record.created_at,
        "updated_at": record.created_at,
        "file": f"/v2/images/{record.id}/file",
        "self": f"/v2/images/{record.id}",
        "schema": "/v2/schemas/image",
        **record.properties,
    }


def _config(images: Sequence[ServedImage], folder: Path, address: str, *, latency_s: float) -> str:
    wait = f"access_by_lua_block {{ ngx.sleep({latency_s}) }} " if latency_s else ""
    locations = [f"location = /v2/images {{ {wait}alias {folder}/images.json; }}"]
    for image in images:
        path = f"/v2/images/{image.record.id}"
        locations.append(f"location = {path} {{ {wait}alias {folder}/{image.record.id}.json; }}")
        if image.path is not None:
            body = f"alias {image.path}; default_type application/octet-stream;"
            locations.append(f"location = {path}/file {{ {wait}{body} }}")
    body = f"alias {folder}/plain/; autoindex on; default_type application/octet-stream;"
    locations.append(f"location /plain/ {{ {wait}{body} }}")
    lines = "\n        ".join(locations)
    return f"""
load_module {MODULES_DIR}/ndk_http_module.so;
load_module {MODULES_DIR}/ngx_http_lua_module.so;
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
events {{ worker_connections 4096; }}
http {{
    log_format sent '{LOG_FORMAT}';
    access_log {folder}/access.log sent;
    sendfile on;
    tcp_nodelay on;
    keepalive_requests 1000000;
    keepalive_timeout 300s;
    server {{
        listen {address}:{PORT};
        default_type application/json;
        location = /server-status {{ stub_status; access_log off; }}
        {lines}
    }}
}}
"""
