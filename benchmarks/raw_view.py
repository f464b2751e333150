"""What does reading a qcow2 image decoded cost, against the same disk as a raw image?

Replays a recorded boot's reads, one after the other, from three images of one disk, 2 ms and 1 Gbit/s away: raw,
qcow2, and qcow2 compressed.  Cold first, then once more with every chunk present, in alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import boot_trace
import cold_start
import contenders
import glance_nginx
import lazyimg_process
import machine
from contenders import Opened
from glance_nginx import NginxGlance, ServedImage, served_image

COLD_RATIO_MAX = 1.15
# The same code reads what is present; what is above 1 is the measurement's spread.
PRESENT_RATIO_MAX = 1.1
# What qemu-img is told, by the name of the image.
CONVERSIONS = {"qcow2": (), "qcow2, compressed": ("-c",)}
# Bytes of four random bits: about half is saved, as with the programs and libraries that a boot reads.
COMPRESSIBLE = bytes(byte & 15 for byte in range(256))


@dataclass
class Result:
    """What one image did, a value per round."""

    cold_s: list[float] = field(default_factory=list)
    present_s: list[float] = field(default_factory=list)
    sent_bytes: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace", type=Path, default=cold_start.HERE / "traces" / "debian-boot.csv")
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where images and caches lie")
    options = parser.parse_args()
    return machine.run_isolated(lambda work_dir: measure(options, work_dir), options.work_dir)


def measure(options: argparse.Namespace, work_dir: Path) -> int:
    """Run all rounds and print the table; 1 if a target is missed."""
    machine.print_machine(["nginx", "-v"], ["qemu-img", "--version"])
    print(f"link: {' '.join(glance_nginx.TBF)}, {glance_nginx.LATENCY_S * 1e3:.0f} ms before each answer")
    os.environ["LAZYIMG_VIEW"] = "raw"
    boot = boot_trace.load_trace(options.trace)
    print(boot.describe())
    images = make_images(boot, work_dir)
    reads = work_dir / "reads.json"
    reads.write_text(json.dumps(boot.reads))
    results = {name: Result() for name in images}
    with glance_nginx.serve_images(list(images.values()), work_dir / "server", is_shaped=True) as server:
        local = Opened("buffered", contenders.local_path(images["raw"]))
        expected = cold_start.replay(local, reads)["checksum"]
        for _ in range(options.rounds):
            for name, image in images.items():
                run_once(results[name], server, image, reads, expected)
    print_table(results)
    return print_verdict(results)


def make_images(boot: boot_trace.Trace, work_dir: Path) -> dict[str, ServedImage]:
    """Write the disk and its conversions; return their records by name, the raw one first."""
    raw = work_dir / "disk.raw"
    boot_trace.make_image(boot, raw, COMPRESSIBLE)
    paths = {"raw": raw}
    for name, options in CONVERSIONS.items():
        paths[name] = work_dir / f"{len(paths)}.qcow2"
        command = ("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, paths[name])
        machine.run(*command, timeout_s=900)
    return {name: _served(number, path) for number, (name, path) in enumerate(paths.items())}


def _served(number: int, path: Path) -> ServedImage:
    # Read once: the server's disk is not what is measured.
    machine.run("cp", path, "/dev/null")
    image_id = f"0e5c0ffe-1a5e-4b1d-9c0d-b007b007b0{number:02}"
    return served_image(path, image_id, path.name, path.suffix.removeprefix("."))


def run_once(result: Result, server: NginxGlance, image: ServedImage, reads: Path, expected: object) -> None:
    """One cold replay, with nothing kept from before, and one more of what is then present."""
    folder = server.access_log.parent.with_name("contender")
    folder.mkdir()
    bytes_before, requests_before = server.sent()
    with lazyimg_process.mount(server.endpoint, folder) as mounted:
        runs = [
            cold_start.replay(Opened("direct", mounted.image_path(image.record)), reads) for _ in range(2)
        ]
    server.wait_sent()
    bytes_after, requests_after = server.sent()
    if any(run["checksum"] != expected for run in runs):
        sys.exit(f"{image.record.name} returned wrong bytes")
    result.cold_s.append(runs[0]["seconds"])
    result.present_s.append(runs[1]["seconds"])
    result.sent_bytes.append(bytes_after - bytes_before)
    result.requests.append(requests_after - requests_before)
    machine.run("rm", "-r", "--one-file-system", folder)


def print_table(results: dict[str, Result]) -> None:
    """Print one line per image: medians of its rounds."""
    print(f"\n{'image':20} {'cold, s':>8} {'lowest':>7} {'highest':>7} {'present, s':>10}", end="")
    print(f" {'MB sent':>8} {'requests':>8}")
    for name, one in results.items():
        cold = f"{machine.median(one.cold_s):8.3f} {min(one.cold_s):7.3f} {max(one.cold_s):7.3f}"
        sent = f"{machine.median(one.sent_bytes) / 1e6:8.2f} {machine.median(one.requests):8.0f}"
        print(f"{name:20} {cold} {machine.median(one.present_s):10.3f} {sent}")


def print_verdict(results: dict[str, Result]) -> int:
    """Print each qcow2's ratios to the raw image; 1 if a target is missed."""
    raw = results["raw"]
    is_missed = False
    print()
    for name in CONVERSIONS:
        one = results[name]
        for what, values, base, ratio_max in (
            ("cold boot", one.cold_s, raw.cold_s, COLD_RATIO_MAX),
            ("bytes fetched", one.sent_bytes, raw.sent_bytes, 1.0),
            ("present reads", one.present_s, raw.present_s, PRESENT_RATIO_MAX),
        ):
            ratio = machine.median(values) / machine.median(base)
            is_missed |= ratio > ratio_max
            verdict = "reached" if ratio <= ratio_max else "MISSED"
            print(f"{what}, {name} / raw: {ratio:.3f} (target ≤ {ratio_max}: {verdict})")
    return int(is_missed)


if __name__ == "__main__":
    sys.exit(main())
