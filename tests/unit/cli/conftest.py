"""What the command line's tests share: a control server in a thread, and a way to run a command."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
from scripted_daemon import CONTENT, IMAGE_ID, Outcome, ScriptedDaemon

from lazyimg import cli
from lazyimg.control import serve_control
from lazyimg.core.identity import base_name


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No configuration from outside, and the signal handlers as they were."""
    for name in os.environ:
        if name.startswith("LAZYIMG_"):
            monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def daemon(tmp_path: Path) -> ScriptedDaemon:
    mount = tmp_path / "instances" / "_base"
    mount.mkdir(parents=True)
    (mount / base_name(IMAGE_ID)).write_bytes(CONTENT)
    return ScriptedDaemon(mount)


@pytest.fixture
def control(daemon: ScriptedDaemon, tmp_path: Path) -> Iterator[Path]:
    """The socket of a server that answers for `daemon`."""
    path = tmp_path / "control.sock"
    is_ready = threading.Event()
    ended: list[Callable[[], None]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            token = trio.lowlevel.current_trio_token()
            ended.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
            await nursery.start(partial(serve_control, daemon, path, mode=0o600, group=None))
            is_ready.set()

    server = threading.Thread(target=trio.run, args=(main,))
    server.start()
    assert is_ready.wait(10)
    yield path
    ended[0]()
    server.join(10)
    assert not server.is_alive()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lazyimg", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return run
