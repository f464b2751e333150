"""What the companion's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from scripted_mount import ScriptedClient

from lazyimg.control import ControlClient


@pytest.fixture
def scripted(tmp_path: Path) -> ScriptedClient:
    mount = tmp_path / "instances, all" / "_base"
    mount.mkdir(parents=True)
    return ScriptedClient(mount)


@pytest.fixture
def client(scripted: ScriptedClient) -> ControlClient:
    return cast(ControlClient, scripted)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder disks are made in; what is left in it is what was left behind."""
    folder = tmp_path / "out: here"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _needs_qemu_img(require: Callable[..., None]) -> None:
    require("qemu-img", "prlimit")
