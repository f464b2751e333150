"""How long do a boot's first reads take when nobody has downloaded the image?

Replays a recorded boot's reads, one after the other, against an image 2 ms and 1 Gbit/s away: through lazyimg
and through what users would use instead, all from the same server over the same link, in alternating rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import boot_trace
import contenders
import glance_nginx
import guest_boot
import machine
from contenders import Contender, Opened
from glance_nginx import NginxGlance, ServedImage, served_image

from lazyimg.demo.guest import Guest, build_guest, default_cache_dir

HERE = Path(__file__).parent
SYSTEM_PYTHON = "/usr/bin/python3"
TARGET_RATIO = 0.75
IMAGE_ID = "0e5c0ffe-1a5e-4b1d-9c0d-b007b007b007"
TOOLS = (
    ["nginx", "-v"],
    ["qemu-nbd", "--version"],
    ["nbdkit", "--version"],
    ["rclone", "version"],
    ["curl", "--version"],
)


@dataclass
class Result:
    """What one contender did, a value per round."""

    cold_s: list[float] = field(default_factory=list)
    again_s: list[float] = field(default_factory=list)
    sent_bytes: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    cold_median_ms: list[float] = field(default_factory=list)
    cold_p99_ms: list[float] = field(default_factory=list)


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ",".join(contenders.PEERS)
    parser.add_argument(
        "--peers", default=names, help=f"which to run beside lazyimg, of {names}; '' for none"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--trace", type=Path, default=HERE / "traces" / "debian-boot.csv")
    parser.add_argument(
        "--synthetic", action="store_true", help="an invented trace in place of a recorded one"
    )
    parser.add_argument("--no-lazyimg", action="store_true", help="the peers alone")
    parser.add_argument(
        "--boot", action="store_true", help="boot the small guest too, cold against local disk"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where image and caches lie")
    options = parser.parse_args()
    chosen = [name for name in options.peers.split(",") if name]
    if unknown := [name for name in chosen if name not in contenders.PEERS]:
        parser.error(f"no peer {unknown[0]!r}; there are {names}")
    peers = [contenders.PEERS[name] for name in chosen]
    # Outside the isolated run, which cannot download its kernel; inside it is found where it was put.
    guest = build_guest(default_cache_dir()) if options.boot else None
    return machine.run_isolated(lambda work_dir: measure(options, peers, guest, work_dir), options.work_dir)


def measure(options: argparse.Namespace, peers: list[Contender], guest: Guest | None, work_dir: Path) -> int:
    """Run all rounds and print the table; 1 if the target is missed."""
    machine.print_machine(*TOOLS)
    print(f"link: {' '.join(glance_nginx.TBF)}, {glance_nginx.LATENCY_S * 1e3:.0f} ms before each answer")
    boot = boot_trace.synthetic_trace() if options.synthetic else boot_trace.load_trace(options.trace)
    print(boot.describe())
    image = make_served_image(boot, work_dir)
    reads = work_dir / "reads.json"
    reads.write_text(json.dumps(boot.reads))
    ways = [*contenders.REFERENCES, *([] if options.no_lazyimg else [contenders.LAZYIMG]), *peers]
    for way in ways:
        if not way.is_installed:
            print(f"missing: {way.name} ({way.program} is not installed; make bench-setup installs it)")
    ways = [way for way in ways if way.is_installed]
    results = {way.name: Result() for way in ways}
    with glance_nginx.serve_images([image], work_dir / "server", is_shaped=True) as server:
        expected = replay(Opened("buffered", contenders.local_path(image)), reads)["checksum"]
        for round_number in range(options.rounds):
            for way in ways:
                if round_number < way.rounds_max:
                    run_once(way, results[way.name], server, image, reads, expected)
    print_table(results)
    missed = print_verdict(results, {way.name for way in peers})
    if guest is not None:
        guest_boot.measure(guest, work_dir, options.rounds)
    return missed


def make_served_image(boot: boot_trace.Trace, work_dir: Path) -> ServedImage:
    """Write the image and return its record."""
    path = work_dir / "image.raw"
    boot_trace.make_image(boot, path)
    # Read once: the server's disk is not what is measured.
    machine.run("cp", path, "/dev/null")
    return served_image(path, IMAGE_ID, boot.name)


def run_once(
    way: Contender, result: Result, server: NginxGlance, image: ServedImage, reads: Path, expected: object
) -> None:
    """One cold replay, with nothing kept from before, and one more where the contender has a cache."""
    folder = server.access_log.parent.with_name("contender")
    folder.mkdir()
    bytes_before, requests_before = server.sent()
    started_s = time.perf_counter()
    with way.open(server, image, folder) as opened:
        # A download is part of the wait; a server that is merely started is not.
        before_s = time.perf_counter() - started_s if way.open is contenders.download else 0.0
        runs = [replay(opened, reads) for _ in range(2 if way.has_cache else 1)]
    server.wait_sent()
    bytes_after, requests_after = server.sent()
    for one in runs:
        if one["checksum"] != expected:
            sys.exit(f"{way.name} returned wrong bytes")
    result.cold_s.append(before_s + runs[0]["seconds"])
    result.cold_median_ms.append(runs[0]["median_ms"])
    result.cold_p99_ms.append(runs[0]["p99_ms"])
    result.again_s.extend(one["seconds"] for one in runs[1:])
    result.sent_bytes.append(bytes_after - bytes_before)
    result.requests.append(requests_after - requests_before)
    machine.run("rm", "-r", "--one-file-system", folder)


def replay(opened: Opened, reads: Path) -> dict[str, float]:
    """Replay in a process of its own and return what it measured."""
    command = (SYSTEM_PYTHON, HERE / "replay.py", reads, opened.kind, opened.path)
    numbers: dict[str, float] = json.loads(machine.run(*map(str, command), timeout_s=900))
    return numbers


def print_table(results: dict[str, Result]) -> None:
    """Print one line per contender: medians of its rounds."""
    print(f"\n{'way':36} {'cold, s':>8} {'lowest':>7} {'highest':>7} {'read p50':>9} {'p99, ms':>8}", end="")
    print(f" {'MB sent':>8} {'requests':>8} {'again, s':>9} {'rounds':>6}")
    for name, result in results.items():
        cold = f"{machine.median(result.cold_s):8.3f} {min(result.cold_s):7.3f} {max(result.cold_s):7.3f}"
        reads = f"{machine.median(result.cold_median_ms):9.3f} {machine.median(result.cold_p99_ms):8.2f}"
        sent = f"{machine.median(result.sent_bytes) / 1e6:8.1f} {machine.median(result.requests):8.0f}"
        again = f"{machine.median(result.again_s):9.3f}" if result.again_s else f"{'no cache':>9}"
        print(f"{name:36} {cold} {reads} {sent} {again} {len(result.cold_s):6}")


def print_verdict(results: dict[str, Result], peers: set[str]) -> int:
    """Print lazyimg's ratio to each peer; 1 if it is above the target against the best one."""
    if contenders.LAZYIMG.name not in results or not peers & results.keys():
        return 0
    own_s = machine.median(results[contenders.LAZYIMG.name].cold_s)
    ratios = {name: own_s / machine.median(results[name].cold_s) for name in results if name in peers}
    print()
    for name, ratio in ratios.items():
        print(f"ratio lazyimg / {name}: {ratio:.2f}")
    best = max(ratios, key=lambda name: ratios[name])
    is_reached = ratios[best] <= TARGET_RATIO
    print(f"target ≤ {TARGET_RATIO} of the best peer ({best}): {'reached' if is_reached else 'MISSED'}")
    return 0 if is_reached else 1


if __name__ == "__main__":
    sys.exit(main())
