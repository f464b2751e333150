"""Which bytes of its image does a Debian boot read, and in which order?

Makes a Debian 12 with systemd in a 4 GiB raw image (mmdebstrap, mkfs.ext4 -d), boots it with its own kernel
and initramfs on a qcow2 overlay, as a guest of lazyimg would, and records what reaches the image below the
overlay: nbdkit serves it and its log filter notes each read.  Writes `traces/NAME.csv` and
`traces/NAME-extents.csv`, which cold_start.py replays.

Run as root: .venv/bin/python benchmarks/record_boot.py [NAME].  Needs Debian packages mmdebstrap, nbdkit,
e2fsprogs, qemu-utils, qemu-system-x86; takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from lazyimg.demo.boot import BOOT_APPEND, BootResult, boot_guest
from lazyimg.demo.programs import require_programs, run_program, started

TRACES = Path(__file__).with_name("traces")
DISK_SIZE = "4G"
MIRROR = "http://deb.debian.org/debian"
# What Debian's cloud images have beside the base system, as far as a boot reads it.
PACKAGES = (
    *("systemd-sysv", "udev", "dbus", "kmod", "linux-image-cloud-amd64", "initramfs-tools", "iproute2"),
    *("ifupdown", "isc-dhcp-client", "openssh-server", "cron", "rsyslog", "sudo", "less", "vim-tiny"),
    *("python3", "ca-certificates"),
)

# The boot is over when systemd has reached its target; the reads of a shutdown are no part of it.
WORD_UNIT = """[Unit]
Description=The guest's word to boot_guest
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/bin/sh -c 'sed -n "s/.*lazyimg.token=\\\\([0-9a-f]*\\\\).*/lazyimg-guest \\\\1 ok debian/p" \
/proc/cmdline > /dev/ttyS0'
ExecStart=/bin/systemctl poweroff --force --force

[Install]
WantedBy=multi-user.target
"""

# nbdkit-log-filter(1): "… Read id=1 offset=0x0 count=0x1000 …"; "...Read" is the answer to it.
LOGGED_READ = re.compile(r" Read id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)")


def main() -> None:
    """Record one boot and write both files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", nargs="?", default="debian-boot")
    name: str = parser.parse_args().name
    require_programs("mmdebstrap", "nbdkit", "mkfs.ext4", "qemu-img", "qemu-system-x86_64")
    with tempfile.TemporaryDirectory(prefix="lazyimg-record-", dir="/var/tmp") as folder:
        work = Path(folder)
        disk = make_disk(work)
        extents = allocated_extents(disk)
        boot, reads = record(work, disk)
        root = work / "root"
        release = (root / "etc" / "debian_version").read_text().strip()
        kernel = (root / "vmlinuz").resolve().name.removeprefix("vmlinuz-")
        write(name, disk.stat().st_size, f"Debian {release}, kernel {kernel}", extents, reads)
    read_bytes = sum(length for _, length in reads)
    print(f"{name}: {len(reads)} reads, {read_bytes / 1e6:.1f} MB, booted in {boot.seconds:.1f} s (TCG)")


def make_disk(work: Path) -> Path:
    """Make the Debian below work/root, and return the raw disk that holds it."""
    root, disk = work / "root", work / "disk.raw"
    run_program(
        ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", "bookworm", root, MIRROR],
        timeout_s=900,
    )
    (root / "etc" / "fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    units = root / "etc" / "systemd" / "system"
    (units / "lazyimg-word.service").write_text(WORD_UNIT)
    (units / "multi-user.target.wants" / "lazyimg-word.service").symlink_to("../lazyimg-word.service")
    run_program(["mkfs.ext4", "-q", "-F", "-d", root, disk, DISK_SIZE], timeout_s=300)
    return disk


def allocated_extents(disk: Path) -> list[tuple[int, int]]:
    """Return `(start, length)` of what is not a hole, adjacent extents as one."""
    mapped = run_program(["qemu-img", "map", "--output=json", "-f", "raw", disk], timeout_s=60)
    extents: list[tuple[int, int]] = []
    for entry in json.loads(mapped):
        if entry["data"] and extents and sum(extents[-1]) == entry["start"]:
            extents[-1] = (extents[-1][0], extents[-1][1] + entry["length"])
        elif entry["data"]:
            extents.append((entry["start"], entry["length"]))
    return extents


def record(work: Path, disk: Path) -> tuple[BootResult, list[tuple[int, int]]]:
    """Boot on an overlay over the disk, and return the boot and the `(offset, length)` reads of the disk."""
    socket, log, overlay = work / "nbd.sock", work / "reads.log", work / "overlay.qcow2"
    argv = ["nbdkit", "--foreground", "--readonly", "--unix", socket, "--filter=log", "file", disk]
    with started([*argv, f"logfile={log}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as nbdkit:
        # The socket appears when nbdkit serves; qemu-img is asked until then.
        base = f"nbd+unix:///?socket={socket}"
        while not socket.exists():
            if nbdkit.poll() is not None:
                raise SystemExit("nbdkit ended before it served; run it by hand to see why")
        run_program(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, overlay], timeout_s=60
        )
        log.write_text("")
        boot = boot_guest(
            (work / "root" / "vmlinuz").resolve(),
            (work / "root" / "initrd.img").resolve(),
            overlay,
            "qcow2",
            append=BOOT_APPEND,
            timeout_s=300,
        )
        found = LOGGED_READ.findall(log.read_text())
    return boot, [(int(offset, 16), int(count, 16)) for offset, count in found]


def write(
    name: str, size_bytes: int, guest: str, extents: list[tuple[int, int]], reads: list[tuple[int, int]]
) -> None:
    """Write both files: a header line of `# key=value`, then one pair a line, in bytes."""
    TRACES.mkdir(exist_ok=True)
    allocated_bytes = sum(length for _, length in extents)
    header = f"# size={size_bytes} allocated={allocated_bytes} guest={guest.replace(' ', '_')}"
    header += " made-by=benchmarks/record_boot.py\n"
    for path, pairs, columns in (
        (TRACES / f"{name}.csv", reads, "offset,length"),
        (TRACES / f"{name}-extents.csv", extents, "start,length"),
    ):
        path.write_text(header + f"# {columns}\n" + "".join(f"{start},{length}\n" for start, length in pairs))


if __name__ == "__main__":
    main()
