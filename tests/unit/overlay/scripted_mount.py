"""A plain folder as the mount, a client that knows its images, and what qemu-img says and is made to say."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lazyimg.control import ImageFacts
from lazyimg.core.identity import base_name
from lazyimg.errors import (
    ImageNotFound,
)

MIB = 1 << 20
GIB = 1 << 30


class ScriptedClient:
    """Knows the images a test put into a folder that stands for the mount."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.facts: dict[str, ImageFacts] = {}

    def image_facts(self, image: str) -> ImageFacts:
        if image not in self.facts:
            raise ImageNotFound(f"image {image}: Glance has none; see openstack image list")
        return self.facts[image]

    def add(self, content: bytes, disk_format: str, **changes: Any) -> ImageFacts:
        image_id = str(uuid.uuid4())
        facts = ImageFacts(
            id=image_id,
            name="debian",
            base_name=base_name(image_id),
            disk_format=disk_format,
            container_format="bare",
            size_bytes=len(content),
            presented_size_bytes=len(content),
            presented_format="qcow2" if disk_format == "qcow2" else "raw",
            view="stored",
            mountpoint=str(self.mount),
            os_hash_algo="sha512",
            os_hash_value=hashlib.sha512(content).hexdigest(),
            checksum=hashlib.md5(content).hexdigest(),
        )
        facts = replace(facts, **changes)
        (self.mount / facts.base_name).write_bytes(content)
        self.facts[image_id] = facts
        return facts


def noise(size_bytes: int) -> bytes:
    # Neither repeated nor, by chance, something with a signature.
    return b"noise" + os.urandom(size_bytes - 5)


def qcow2(path: Path, *options: str, size: str = "64M") -> bytes:
    path.unlink(missing_ok=True)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(command, check=True)
    content = path.read_bytes()
    path.unlink()
    return content


def info(disk: Path) -> dict[str, Any]:
    command = ["qemu-img", "info", "--output=json", str(disk)]
    facts: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return facts


@contextmanager
def fake_qemu_img(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder.mkdir()
    (folder / "qemu-img").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "qemu-img").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield
