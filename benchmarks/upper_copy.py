"""How fast is a large file copied into the folder beneath the mount, against the same folder without the mount?

As Nova does it: written in blocks, fsync, then renamed to its final name.  Without the fsync the copy ends in
the page cache; that is printed too, because it shows what the daemon itself costs, and has no target.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import lazyimg_process
import machine

TARGET_RATIO = 0.4
# Nobody is asked for anything: no image is looked at.
ENDPOINT = "http://127.0.0.1:9"


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=2048)
    parser.add_argument("--block-kib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where the copies lie")
    options = parser.parse_args()
    return machine.run_isolated(lambda work_dir: measure(options, work_dir), options.work_dir)


def measure(options: argparse.Namespace, work_dir: Path) -> int:
    """Copy in turn with and without the mount and print the ratios; 1 if the target is missed."""
    machine.print_machine()
    plain = work_dir / "plain"
    plain.mkdir()
    times: dict[tuple[str, bool], list[float]] = {}
    with lazyimg_process.mount(ENDPOINT, work_dir / "lazyimg") as mounted:
        for _ in range(options.rounds):
            for is_durable in (True, False):
                for name, folder in (("plain", plain), ("mount", mounted.mountpoint)):
                    machine.drop_page_cache()
                    took_s = copy(
                        folder, options.size_mib << 20, options.block_kib << 10, is_durable=is_durable
                    )
                    times.setdefault((name, is_durable), []).append(took_s)
    ratios = {}
    for is_durable in (True, False):
        plain_s, mount_s = (machine.median(times[name, is_durable]) for name in ("plain", "mount"))
        ratios[is_durable] = plain_s / mount_s
        what = "with fsync" if is_durable else "page cache only"
        print(f"{what}: plain {plain_s:.2f} s, mount {mount_s:.2f} s, speed ratio {ratios[is_durable]:.2f}")
    print(f"target: {TARGET_RATIO} with fsync")
    return 0 if ratios[True] >= TARGET_RATIO else 1


def copy(folder: Path, size_bytes: int, block_bytes: int, *, is_durable: bool) -> float:
    """Write a file as Nova's download does; return the seconds until it has its final name."""
    block = os.urandom(block_bytes)
    part, final = folder / "file.part", folder / "file"
    started_s = time.monotonic()
    with part.open("wb", buffering=0) as file:
        for _ in range(size_bytes // block_bytes):
            file.write(block)
        if is_durable:
            os.fsync(file.fileno())
    part.rename(final)
    took_s = time.monotonic() - started_s
    final.unlink()
    return took_s


if __name__ == "__main__":
    sys.exit(main())
