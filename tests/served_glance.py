"""The embedded Glance as a process of its own, for tests through a real mount: images, faults, outages.

An image's content names the image and the offset in each eight bytes, so that a shifted or missing byte shows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import urllib.request
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lazyimg.core.identity import base_name
from lazyimg.demo.faults import FaultPlan, FaultRule
from lazyimg.demo.programs import wait_first_line
from lazyimg.demo.upload import upload_image

MIB = 1 << 20
START_TIMEOUT_S = 60
ANSWER_TIMEOUT_S = 30


@cache
def pattern(number: int, size_bytes: int) -> bytes:
    """Return content in which each eight bytes are their own index and `number`; none of them are zero."""
    first = (number + 1) << 40
    return array("Q", range(first, first + -(-size_bytes // 8))).tobytes()[:size_bytes]


@dataclass(frozen=True)
class ServedImage:
    """An image in a Glance, and the bytes it must read as."""

    id: str
    content: bytes

    @property
    def base_name(self) -> str:
        return base_name(self.id)


class ServedGlance:
    """One embedded Glance; `stop` and `start` make an outage, the port and the images stay."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder = folder
        self._options = options
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._count = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Return when it answers."""
        command = [sys.executable, "-m", "lazyimg.demo.glance", "--data", str(self._folder)]
        command += ["--port", str(self._port), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        url = wait_first_line(self._process, "the embedded Glance", timeout_s=START_TIMEOUT_S)
        self._port = int(url.rpartition(":")[2])

    def stop(self) -> None:
        """End it; connections are dropped."""
        if self._process is not None:
            process, self._process = self._process, None
            with process:
                process.terminate()
                process.wait(ANSWER_TIMEOUT_S)

    def add(self, content: bytes | int, disk_format: str = "raw", **fields: Any) -> ServedImage:
        """Upload an image with this content, or with a pattern of this many bytes."""
        self._count += 1
        if isinstance(content, int):
            content = pattern(self._count, content)
        record = {"name": f"image {self._count}", "disk_format": disk_format, "container_format": "bare"}
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            image_id = upload_image(self.url, Path(file.name), record | fields, timeout_s=START_TIMEOUT_S)
        return ServedImage(image_id, content)

    def add_queued(self) -> str:
        """Return the id of an image without data."""
        record = {"name": "queued", "disk_format": "raw", "container_format": "bare"}
        created = self._ask("POST", "/v2/images", record)
        return str(created["id"])

    def upload(self, image_id: str, content: bytes) -> None:
        """Give a queued image its data."""
        request = urllib.request.Request(f"{self.url}/v2/images/{image_id}/file", content)
        request.add_header("Content-Type", "application/octet-stream")
        request.method = "PUT"
        urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S).close()

    def record(self, image: ServedImage) -> dict[str, Any]:
        """Return the image's record."""
        found: dict[str, Any] = self._ask("GET", f"/v2/images/{image.id}")
        return found

    def delete(self, image: ServedImage) -> None:
        self._ask("DELETE", f"/v2/images/{image.id}")

    def damage(self, image: ServedImage, at: int) -> None:
        """Flip one bit of the image's data in the store, without Glance's knowledge; twice is never."""
        with (self._folder / f"{image.id}.data").open("r+b", buffering=0) as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 4]))

    def act(self, image: ServedImage, action: str) -> None:
        """deactivate or reactivate an image."""
        self._ask("POST", f"/v2/images/{image.id}/actions/{action}")

    def fail(self, *rules: FaultRule) -> None:
        """Set the faults from now on; none: all is well again.  Requests that stall already go on stalling."""
        self._ask("PUT", "/faults", FaultPlan(*rules).to_json())

    def requests(self, image: ServedImage | None = None) -> list[Mapping[str, Any]]:
        """Return the requests so far, those of one image only if it is given, newest last."""
        found: list[Mapping[str, Any]] = self._ask("GET", "/requests")
        return [one for one in found if image is None or image.id in one["path"]]

    def list_requests(self) -> list[Mapping[str, Any]]:
        """Return the requests for the list of images: a daemon asks for the records of images in use when it will."""
        return [one for one in self.requests() if one["path"].partition("?")[0] == "/v2/images"]

    def data_requests(self, image: ServedImage) -> list[Mapping[str, Any]]:
        """Return the requests for an image's bytes."""
        return [
            one for one in self.requests(image) if one["method"] == "GET" and one["path"].endswith("/file")
        ]

    def _ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        request.method = method
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
            return json.loads(answer.read() or b"null")
