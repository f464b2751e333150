"""A real guest's boot: cold through lazyimg, 2 ms and 1 Gbit/s away, against the same image on local disk.

Kernel and ramdisk are local files for both, so the difference is that of the disk's reads.
"""

from __future__ import annotations

import time
from pathlib import Path

import glance_nginx
import lazyimg_process
import machine
from glance_nginx import NginxGlance, ServedImage, served_image

from lazyimg.demo.boot import Accelerator, boot_guest, choose_accelerator
from lazyimg.demo.guest import Guest

IMAGE_ID = "9e57b007-0000-4000-8000-9e57b0079e57"


def measure(guest: Guest, work_dir: Path, rounds: int) -> None:
    """Boot in alternating rounds and print medians and ratio."""
    accelerator = choose_accelerator(guest.kernel)
    allocated_mb = guest.disk_allocated_bytes / 1e6
    print(
        f"\nguest {guest.version} under {accelerator}: disk of {guest.disk_size_bytes / 1e6:.0f} MB", end=""
    )
    print(f", {allocated_mb:.0f} MB allocated")
    image = served_image(guest.disk, IMAGE_ID, "guest disk")
    machine.run("cp", guest.disk, "/dev/null")
    local_s: list[float] = []
    lazyimg_s: list[float] = []
    sent_bytes: list[float] = []
    with glance_nginx.serve_images([image], work_dir / "guest-server", is_shaped=True) as server:
        for round_number in range(rounds):
            local_s.append(boot_local(guest, work_dir / "local.qcow2", accelerator))
            folder = work_dir / f"boot-{round_number}"
            bytes_before, _ = server.sent()
            lazyimg_s.append(boot_lazily(guest, image, server, folder, accelerator))
            server.wait_sent()
            sent_bytes.append(server.sent()[0] - bytes_before)
    lazy, local = machine.median(lazyimg_s), machine.median(local_s)
    print(f"boot from the local disk:     {local:6.2f} s")
    print(f"boot through lazyimg, cold:   {lazy:6.2f} s, {machine.median(sent_bytes) / 1e6:.1f} MB sent")
    print(f"ratio lazyimg / local: {lazy / local:.2f}, {(lazy - local) * 1e3:.0f} ms more, {rounds} rounds")


def boot_local(guest: Guest, overlay: Path, accelerator: Accelerator) -> float:
    """Boot on an overlay over the local disk image, its overlay made within the time as lazyimg's is."""
    overlay.unlink(missing_ok=True)
    started_s = time.monotonic()
    command = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", guest.disk, overlay)
    machine.run(*command)
    made_s = time.monotonic() - started_s
    return made_s + boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2", accelerator=accelerator).seconds


def boot_lazily(
    guest: Guest, image: ServedImage, server: NginxGlance, folder: Path, accelerator: Accelerator
) -> float:
    """Boot on an overlay that `lazyimg overlay create` makes over an image of which nothing is present."""
    overlay = folder / "lazy.qcow2"
    with lazyimg_process.mount(server.endpoint, folder) as mounted:
        started_s = time.monotonic()
        create = (lazyimg_process.LAZYIMG, "overlay", "create", image.record.id, overlay)
        machine.run(*create, "--control", mounted.control)
        made_s = time.monotonic() - started_s
        boot = boot_guest(guest.kernel, guest.ramdisk, overlay, "qcow2", accelerator=accelerator)
        return made_s + boot.seconds
