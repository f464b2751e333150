"""Uploads an image over Glance's own HTTP API, as any other client of Glance would.

On the standard library's http.client: the demo is a user of Glance here, not part of the path it shows.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from lazyimg.errors import LazyImgError

_BLOCK_SIZE_BYTES = 1 << 20
# Glance hashes while it stores; this is for one block of it, and for its answers.
_SOCKET_TIMEOUT_S = 60.0
_ANSWER_BYTES_MAX = 1 << 20


def upload_image(endpoint: str, path: Path, fields: Mapping[str, str], *, timeout_s: float) -> str:
    """Create an image with these fields and the file's bytes, and return its id (Image API ref, POST, PUT).

    Raises LazyImgError naming the file and what Glance said, or the `timeout_s` that passed.
    """
    url = urlsplit(endpoint)
    assert url.hostname is not None
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=_SOCKET_TIMEOUT_S)
    try:
        record = _ask(connection, "POST", "/v2/images", json.dumps(dict(fields)).encode(), "application/json")
        image_id: str = json.loads(record)["id"]
        _put(connection, f"/v2/images/{image_id}/file", path, time.monotonic() + timeout_s)
    except TimeoutError as exc:
        raise LazyImgError(f"upload of {path.name} to {endpoint}: no progress or too slow") from exc
    except (OSError, http.client.HTTPException, ValueError, KeyError) as exc:
        raise LazyImgError(f"upload of {path.name} to {endpoint}: {exc or type(exc).__name__}") from exc
    finally:
        connection.close()
    return image_id


def _put(connection: http.client.HTTPConnection, target: str, path: Path, deadline: float) -> None:
    # The length is given: http.client would otherwise send chunks, which some web servers refuse.
    headers = {"Content-Type": "application/octet-stream", "Content-Length": str(path.stat().st_size)}
    connection.request("PUT", target, body=_blocks(path, deadline), headers=headers)
    _answer(connection)


def _ask(
    connection: http.client.HTTPConnection, method: str, target: str, body: bytes, content_type: str
) -> bytes:
    connection.request(method, target, body=body, headers={"Content-Type": content_type})
    return _answer(connection)


def _answer(connection: http.client.HTTPConnection) -> bytes:
    answer = connection.getresponse()
    body = answer.read(_ANSWER_BYTES_MAX)
    if answer.status not in (200, 201, 204):
        raise ValueError(f"Glance answered {answer.status} {answer.reason}: {body[:200]!r}")
    return body


def _blocks(path: Path, deadline: float) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_SIZE_BYTES):
            if time.monotonic() > deadline:
                raise TimeoutError
            yield block
