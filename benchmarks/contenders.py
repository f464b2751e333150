"""The ways to read an image nobody has downloaded, each started cold around a replay.

Each contender is a context manager that yields where its reads go.  What it starts, it ends.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import lazyimg_process
import machine
from glance_nginx import NginxGlance, ServedImage


@dataclass(frozen=True)
class Opened:
    """Where a contender's reads go: `kind` is replay.py's direct, buffered or nbd."""

    kind: str
    path: Path


Open = Callable[[NginxGlance, ServedImage, Path], AbstractContextManager[Opened]]


@dataclass(frozen=True)
class Contender:
    """One way: `program` must be there, `has_cache` says whether reading again means anything."""

    name: str
    program: str
    open: Open
    has_cache: bool
    rounds_max: int = 1000

    @property
    def is_installed(self) -> bool:
        """True if its program can be run."""
        return shutil.which(self.program) is not None


def local_path(image: ServedImage) -> Path:
    """Return the file of an image that has one."""
    assert image.path is not None
    return image.path


@contextlib.contextmanager
def local_file(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """The image as a plain local file, in the page cache: nothing can be faster."""
    yield Opened("buffered", local_path(image))


@contextlib.contextmanager
def local_direct(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """The same with O_DIRECT, as qemu's cache=none reads it: this machine's disk."""
    yield Opened("direct", local_path(image))


@contextlib.contextmanager
def local_nbd(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """The local file through nbdkit: what measuring over NBD costs by itself."""
    with _nbdkit(folder, "file", str(local_path(image))) as opened:
        yield opened


@contextlib.contextmanager
def lazyimg(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """This project, as configured by default."""
    with lazyimg_process.mount(server.endpoint, folder) as mounted:
        yield Opened("direct", mounted.image_path(image.record))


@contextlib.contextmanager
def download(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """The whole image by curl to a local file; `replay` adds the reads."""
    path = folder / "image.raw"
    machine.run(
        "curl", "--silent", "--show-error", "--fail", "--output", path, server.image_url(image), timeout_s=900
    )
    yield Opened("buffered", path)


def qemu_curl(readahead_bytes: int) -> Open:
    """qemu's own curl driver, served by qemu-nbd."""

    @contextlib.contextmanager
    def opened(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
        socket = folder / "nbd.sock"
        url = server.image_url(image)
        options = f"driver=raw,file.driver=http,file.url={url},file.readahead={readahead_bytes}"
        command = ["qemu-nbd", "--read-only", "--persistent", f"--socket={socket}", "--image-opts", options]
        with _nbd_server(command, socket, folder):
            yield Opened("nbd", socket)

    return opened


@contextlib.contextmanager
def nbdkit_plain(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """nbdkit's curl plugin alone: one request per read."""
    with _nbdkit(folder, "curl", server.image_url(image)) as opened:
        yield opened


@contextlib.contextmanager
def nbdkit_cached(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """nbdkit's curl plugin under its readahead and cache filters, which keeps what was read."""
    filters = ("--filter=readahead", "--filter=cache")
    options = ("cache-on-read=true", "cache-min-block-size=65536")
    with _nbdkit(folder, *filters, "curl", server.image_url(image), *options) as opened:
        yield opened


@contextlib.contextmanager
def _nbdkit(folder: Path, *arguments: str) -> Iterator[Opened]:
    socket = folder / "nbd.sock"
    command = ["nbdkit", "--foreground", "--readonly", "--unix", str(socket), *arguments]
    with _nbd_server(command, socket, folder):
        yield Opened("nbd", socket)


@contextlib.contextmanager
def _nbd_server(command: list[str], socket: Path, folder: Path) -> Iterator[None]:
    log = folder / "nbd.log"
    with machine.background_process(command, log) as process:

        def is_listening() -> bool:
            if process.poll() is not None:
                sys.exit(f"{command[0]} ended with {process.returncode}: {log.read_text().strip()}")
            return socket.exists()

        machine.wait_until(is_listening, f"{command[0]} on {socket}")
        yield


@contextlib.contextmanager
def rclone(server: NginxGlance, image: ServedImage, folder: Path) -> Iterator[Opened]:
    """rclone's mount of the web folder, keeping what was read."""
    mountpoint = folder / "rclone"
    mountpoint.mkdir()
    command = ["rclone", "mount", ":http:", str(mountpoint), "--http-url", server.plain_url, "--read-only"]
    command += ["--vfs-cache-mode", "full", "--cache-dir", str(folder / "cache"), "--config", "/dev/null"]
    with machine.background_process(command, folder / "rclone.log"):
        machine.wait_until(mountpoint.is_mount, "rclone mount")
        try:
            yield Opened("direct", mountpoint / f"{image.record.id}.raw")
        finally:
            # Ends the program in the orderly way; a busy mount goes when its last user does.
            subprocess.run(["umount", "--lazy", mountpoint], check=False)


REFERENCES = (
    Contender("local file, page cache", "sh", local_file, has_cache=True),
    Contender("local file, O_DIRECT", "sh", local_direct, has_cache=True),
    Contender("local file through nbdkit", "nbdkit", local_nbd, has_cache=True),
)
LAZYIMG = Contender("lazyimg", "fusermount3", lazyimg, has_cache=True)
PEERS = {
    "qemu": Contender("qemu curl driver", "qemu-nbd", qemu_curl(256 << 10), has_cache=False),
    "qemu64k": Contender(
        "qemu curl driver, readahead 64 KiB", "qemu-nbd", qemu_curl(64 << 10), has_cache=False
    ),
    "nbdkit": Contender("nbdkit curl", "nbdkit", nbdkit_plain, has_cache=False),
    "nbdkit-cache": Contender("nbdkit curl, readahead and cache", "nbdkit", nbdkit_cached, has_cache=True),
    "rclone": Contender("rclone mount, full cache", "rclone", rclone, has_cache=True),
    "download": Contender("full download, then local", "curl", download, has_cache=True, rounds_max=1),
}
