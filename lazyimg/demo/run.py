"""The main job from end to end: a guest boots from an image that nobody has downloaded.

Everything is done as an operator would do it: Glance over HTTP, lazyimg by its own commands, qemu on the
files they made.  Each step has a deadline; at the end, good or bad, nothing is mounted, running or left over.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lazyimg.demo.boot import Accelerator, BootResult, boot_guest, choose_accelerator
from lazyimg.demo.guest import Guest, build_guest, default_cache_dir
from lazyimg.demo.programs import (
    require_programs,
    run_program,
    started,
    wait_first_line,
    wait_until_ended,
)
from lazyimg.demo.upload import upload_image
from lazyimg.errors import LazyImgError

_INSTANCE_DISK_SIZE = "4G"
_GLANCE_READY_TIMEOUT_S = 30.0
_UPLOAD_TIMEOUT_S = 120.0
_MOUNT_READY_TIMEOUT_S = 30.0
_COMMAND_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 15.0
_POLL_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What happened, in numbers; `image` is the disk image's entry in `lazyimg status --json`."""

    guest: Guest
    accelerator: Accelerator
    overlay_seconds: float
    boot: BootResult
    image: dict[str, Any]


class _Interrupted(BaseException):
    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_demo(*, keep: bool = False, cache_dir: Path | None = None, console: Console | None = None) -> int:
    """Run the demo, print what happened, and return the exit code: 0, or 128 and the signal that ended it.

    `keep` leaves the work folder with disk, cache and logs for a look; `cache_dir` is where the guest is kept
    between runs.  Raises LazyImgError with one line on what went wrong, when all is cleaned up.
    """
    console = console or Console()
    try:
        with _interrupts_raised():
            result = _run(console, keep, cache_dir or default_cache_dir())
    except _Interrupted as exc:
        console.print("interrupted; everything is unmounted and ended")
        return 128 + exc.number
    console.print(_table(result))
    return 0


def _run(console: Console, keep: bool, cache_dir: Path) -> DemoResult:
    require_programs("qemu-system-x86_64", "qemu-img", "fusermount3", "mkfs.ext4", "dpkg-deb", "apt-get")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise LazyImgError("/dev/fuse is not there or not open to you; load the fuse module, or run as root")
    with ExitStack() as stack:
        work = stack.enter_context(_work_folder(console, keep))
        with _step(console, "guest: kernel, ramdisk and disk at hand"):
            guest = build_guest(cache_dir, report=lambda line: console.print(f"  {line}"))
            accelerator = choose_accelerator(guest.kernel)
        with _step(console, "embedded Glance started, three images uploaded"):
            endpoint = stack.enter_context(_glance(work))
            image_id = _upload(endpoint, guest)
        lazyimg = _Lazyimg(work)
        with _step(console, f"mounted on {lazyimg.mountpoint}"):
            daemon = stack.enter_context(lazyimg.mounted(endpoint))
        with _step(console, "instance created: overlay, kernel and ramdisk"):
            overlay_seconds = lazyimg.create_instance(image_id)
        instance = lazyimg.instance
        with _step(console, f"guest booted under {accelerator}, and checked its files"):
            boot = boot_guest(
                instance / "kernel", instance / "ramdisk", instance / "disk", "qcow2", accelerator=accelerator
            )
        image = lazyimg.status_of(image_id)
        with _step(console, "unmounted"):
            lazyimg.command("umount", lazyimg.mountpoint)
            # Where / is not a shared mount, a namespace that was made meanwhile keeps its copy of ours.
            what = "lazyimg mount, after the unmount (does another mount namespace hold it?)"
            wait_until_ended(daemon, what, timeout_s=_STOP_TIMEOUT_S)
    return DemoResult(guest, accelerator, overlay_seconds, boot, image)


def _table(result: DemoResult) -> Table:
    size_bytes, fetched_bytes = result.guest.disk_size_bytes, int(result.image["fetched_bytes"])
    facts = dict(word.split("=") for word in result.boot.word.split()[1:])
    checked = f"{facts['files']} files, {decimal(int(facts['bytes']))}"
    title = "A VM ran on an image nobody has downloaded"
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_row("time to a ready overlay", f"{result.overlay_seconds:.1f} s")
    table.add_row(
        "time to boot", f"{result.boot.seconds:.1f} s ({result.accelerator}), to the guest's own word"
    )
    table.add_row(
        "what the guest says",
        f"Linux {facts['kernel']} is up, {checked} read from its disk, all as they should be",
    )
    table.add_row(
        "bytes in the image",
        f"{decimal(size_bytes)} to download, {decimal(result.guest.disk_allocated_bytes)} of it not zeros",
    )
    table.add_row(
        "bytes fetched",
        f"{decimal(fetched_bytes)} in {result.image['requests']} requests: "
        f"{fetched_bytes / size_bytes:.1%} of the download",
    )
    return table


# ── Glance ──


@contextmanager
def _glance(work: Path) -> Iterator[str]:
    """Run the embedded Glance, and yield its URL."""
    argv: list[str | Path] = [
        sys.executable,
        "-m",
        "lazyimg.demo.glance",
        "--data",
        work / "glance",
        "--port",
        "0",
    ]
    with (
        (work / "glance.log").open("wb") as log,
        started(argv, stdout=subprocess.PIPE, stderr=log.fileno(), stop_timeout_s=_STOP_TIMEOUT_S) as process,
    ):
        yield wait_first_line(process, "embedded Glance", timeout_s=_GLANCE_READY_TIMEOUT_S)


def _upload(endpoint: str, guest: Guest) -> str:
    """Upload kernel, ramdisk and disk, and return the disk image's id; it names the other two."""
    properties = {}
    for key, path, kind in (("kernel_id", guest.kernel, "aki"), ("ramdisk_id", guest.ramdisk, "ari")):
        fields = {"name": f"demo-{path.name}", "disk_format": kind, "container_format": kind}
        properties[key] = upload_image(endpoint, path, fields, timeout_s=_UPLOAD_TIMEOUT_S)
    fields = {"name": "demo-disk", "disk_format": "raw", "container_format": "bare", **properties}
    return upload_image(endpoint, guest.disk, fields, timeout_s=_UPLOAD_TIMEOUT_S)


# ── lazyimg ──


class _Lazyimg:
    """lazyimg as its commands show it: one mount, one control socket, one instance folder below `work`."""

    def __init__(self, work: Path) -> None:
        self.mountpoint = work / "_base"
        self.instance = work / "instance"
        self._control = work / "control.sock"
        self._cache_dir = work / "cache"
        self._log = work / "mount.log"
        # The script beside this interpreter, whatever is on PATH.
        self._script = Path(sys.executable).with_name("lazyimg")
        # An empty one: the demo is not to depend on what this machine's operator has set.
        config = work / "lazyimg.toml"
        config.touch()
        self._env = {"LAZYIMG_CONFIG": str(config)}

    @contextmanager
    def mounted(self, endpoint: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run `lazyimg mount` and yield it once it is ready; afterwards nothing is mounted."""
        self.mountpoint.mkdir()
        argv: list[str | Path] = [self._script, "mount", self.mountpoint, "--endpoint", endpoint]
        argv += ["--cache-dir", self._cache_dir, "--control", self._control]
        with self._log.open("wb") as log:
            try:
                with started(
                    argv,
                    stdout=log.fileno(),
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    stop_timeout_s=_STOP_TIMEOUT_S,
                ) as process:
                    self._wait_ready(process)
                    yield process
            finally:
                # Only if the daemon could not do it; not by a command of ours, which may be what failed.
                if is_mounted(self.mountpoint):
                    run_program(["fusermount3", "-u", "-z", self.mountpoint], timeout_s=_COMMAND_TIMEOUT_S)

    def create_instance(self, image_id: str) -> float:
        """Make the instance's files, and return the seconds it took."""
        start = time.monotonic()
        argv = ["--image", image_id, "--size", _INSTANCE_DISK_SIZE]
        self.command("instance", "create", self.instance, *argv, "--control", self._control)
        return time.monotonic() - start

    def status_of(self, image_id: str) -> dict[str, Any]:
        """Return the image's entry in `lazyimg status --json`."""
        images = json.loads(self.command("status", "--json", "--control", self._control))["images"]
        for image in images:
            if image["id"] == image_id:
                return dict(image)
        raise LazyImgError(f"image {image_id}: lazyimg status does not show it, though a guest has read it")

    def command(self, *words: str | Path, timeout_s: float = _COMMAND_TIMEOUT_S) -> str:
        """Run `lazyimg WORDS` and return what it printed."""
        return run_program([self._script, *words], timeout_s=timeout_s, env=self._env)

    def _wait_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _MOUNT_READY_TIMEOUT_S
        while True:
            try:
                self.command("status", "--json", "--control", self._control)
                return
            except LazyImgError as exc:
                said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                if process.poll() is not None:
                    raise LazyImgError(f"lazyimg mount ended: {' '.join(said) or 'no message'}") from exc
                if time.monotonic() > deadline:
                    raise LazyImgError(f"lazyimg mount is not ready: {exc}") from exc
            time.sleep(_POLL_PAUSE_S)


def is_mounted(path: Path) -> bool:
    """True if something is mounted on `path`; asks the mount table, as the mount itself may hang."""
    # proc(5), mountinfo: the fifth field, with blanks as octal escapes.
    escaped = str(path.absolute()).replace("\\", "\\134").replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split(" ")[4] == escaped for line in lines)


# ── around the steps ──


@contextmanager
def _step(console: Console, text: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    console.print(f"{time.monotonic() - start:6.1f} s  {text}", highlight=False)


@contextmanager
def _work_folder(console: Console, keep: bool) -> Iterator[Path]:
    """Yield a new folder; afterwards it is gone, or its path printed."""
    # /var/tmp, not /tmp: some GiB, and qemu's O_DIRECT does not work on a tmpfs.
    folder = Path(tempfile.mkdtemp(prefix="lazyimg-demo-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        yield folder
    finally:
        if keep:
            console.print(f"kept: {folder}")
        elif is_mounted(folder / "_base"):
            # Deleting would reach through the mount.
            console.print(f"{folder / '_base'} is still mounted; run umount --lazy on it and delete {folder}")
        else:
            shutil.rmtree(folder)


@contextmanager
def _interrupts_raised() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into an exception; later ones must not cut the cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    is_raised = False

    def raise_once(number: int, _frame: FrameType | None) -> None:
        nonlocal is_raised
        if not is_raised:
            is_raised = True
            raise _Interrupted(number)

    before = [signal.signal(number, raise_once) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
