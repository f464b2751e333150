"""How much memory does an idle daemon take with 100 images of 20 GiB wholly present?

The cache is made through the store itself: entries and checksum pages for every chunk, and sparse chunk
files, whose holes are just the zeros that the checksums say.  So each read that follows is verified as ever.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import uuid
from pathlib import Path

import glance_nginx
import lazyimg_process
import machine
import xxhash
from glance_nginx import ServedImage, served_image
from lazyimg_process import Mounted

from lazyimg.config import Config
from lazyimg.core.chunks import CHUNK_SIZE_BYTES, chunk_count
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import PAGE_CHUNKS

TARGET_MB = 120
# That of a daemon that is told nothing.
VIEW = Config().view
READS_PER_IMAGE = 64


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--size-gib", type=int, default=20)
    parser.add_argument("--work-dir", type=Path, default=Path("/var/tmp"), help="where the cache lies")
    options = parser.parse_args()
    return machine.run_isolated(lambda work_dir: measure(options, work_dir), options.work_dir)


def measure(options: argparse.Namespace, work_dir: Path) -> int:
    """Make the cache, mount, and print what the processes take; 1 if the target is missed."""
    machine.print_machine(["nginx", "-v"])
    images = make_images(options.images, options.size_gib << 30, work_dir)
    folder = work_dir / "lazyimg"
    folder.mkdir()
    fill_cache(images, folder / "cache")
    with (
        glance_nginx.serve_images(images, work_dir / "server", is_shaped=False) as server,
        lazyimg_process.mount(server.endpoint, folder) as mounted,
    ):
        present = [image["present_bytes"] for image in mounted.status()["images"]]
        if sorted(present) != [options.size_gib << 30] * options.images:
            sys.exit(f"the daemon does not see {options.images} whole images: {present}")
        print(f"{options.images} images of {options.size_gib} GiB, all present\n")
        print(f"{'when':32} {'process':8} {'RSS, MB':>8} {'PSS, MB':>8}")
        worst_mb = print_memory("ready, nothing read", mounted)
        read_some(mounted, images)
        worst_mb = max(worst_mb, print_memory("each image read, idle again", mounted))
        _, requests = server.sent()
        print(f"requests for image data meanwhile: {requests}")
    is_reached = worst_mb < TARGET_MB
    print(f"target < {TARGET_MB} MB resident, both together: {'reached' if is_reached else 'MISSED'}")
    return 0 if is_reached else 1


def make_images(count: int, size_bytes: int, work_dir: Path) -> list[ServedImage]:
    """Return images of nothing but zeros; they share one sparse file at the server."""
    path = work_dir / "zeros.raw"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    chance = random.Random(count)
    return [
        served_image(path, str(uuid.UUID(int=chance.getrandbits(128), version=4)), f"image {number}")
        for number in range(count)
    ]


def fill_cache(images: list[ServedImage], cache_dir: Path) -> None:
    """Make a cache folder in which every chunk of every image is present."""
    zeros_sum = xxhash.xxh3_64_intdigest(bytes(CHUNK_SIZE_BYTES))
    cache = CacheDir(cache_dir)
    for image in images:
        record = image.record
        assert record.size_bytes is not None
        chunks = chunk_count(record.size_bytes)
        entry = ImageEntry(record, VIEW, record.size_bytes, last_used_s=1.0, in_use=True)
        cache.index.put(entry)
        # Makes the sparse file and its generation.
        cache.open_image(entry.key)
        cache.close_image(entry.key)
        stored = cache.index.get(entry.key)
        assert stored is not None
        sums = [zeros_sum] * chunks + [0] * (-chunks % PAGE_CHUNKS)
        pages = {
            page: sums[page * PAGE_CHUNKS : (page + 1) * PAGE_CHUNKS]
            for page in range(len(sums) // PAGE_CHUNKS)
        }
        cache.index.commit(entry.key, stored.generation, pages, chunks)
    cache.close()


def read_some(mounted: Mounted, images: list[ServedImage]) -> None:
    """Read every image in places all over it, so that its pages of checksums were in use."""
    chance = random.Random(1)
    for image in images:
        assert image.record.size_bytes is not None
        fd = os.open(mounted.image_path(image.record), os.O_RDONLY | os.O_CLOEXEC)
        try:
            for _ in range(READS_PER_IMAGE):
                offset = chance.randrange(image.record.size_bytes // 4096) * 4096
                if os.pread(fd, 4096, offset) != bytes(4096):
                    sys.exit(f"image {image.record.id}: wrong bytes at {offset}")
        finally:
            os.close(fd)


def print_memory(when: str, mounted: Mounted) -> float:
    """Print RSS and PSS of daemon and holder; return their RSS together in MB."""
    processes = {"daemon": mounted.status()["daemon_pid"], "holder": mounted.process_id}
    if processes["daemon"] == processes["holder"]:
        del processes["holder"]
    together_mb = 0.0
    for name, process_id in processes.items():
        rss_mb, pss_mb = (memory_mb(process_id, field) for field in ("Rss", "Pss"))
        print(f"{when:32} {name:8} {rss_mb:8.1f} {pss_mb:8.1f}")
        together_mb += rss_mb
    return together_mb


def memory_mb(process_id: int, field: str) -> float:
    """Return one field of /proc/PID/smaps_rollup in MB (man 5 proc)."""
    for line in Path(f"/proc/{process_id}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit(f"process {process_id}: smaps_rollup has no {field}")


if __name__ == "__main__":
    sys.exit(main())
