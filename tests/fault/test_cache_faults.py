"""Everything that can befall the cache's disk, seen through a real mount: a read stays the image's bytes.

Expected each time:

    disk full                       served without storing, status says so, evicted images make room again
    chunk changed on disk           found at its first read after the start, fetched again
    chunk file, index gone          all of it is fetched again
    index damaged                   set aside, all of it is fetched again
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kernel_marks import needs_resend
from real_mount import Mount, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage
from store_images import damage

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

CHUNK = 1 << 16


@pytest.fixture
def small_disk(mountable: None, tmp_path: Path) -> Iterator[Path]:
    """A cache folder on a file system of 12 MiB."""
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(where)], check=True)
    yield where / "cache"
    subprocess.run(["umount", "--lazy", str(where)], check=True)


def chunk_files(mount: Mount) -> list[Path]:
    return sorted((mount.cache_dir / "chunks").iterdir())


@pytest.fixture
def stopped(make_mount: Callable[..., Mount], glance: ServedGlance) -> tuple[Mount, ServedImage]:
    """A mount whose daemon is down, with one image wholly in its cache."""
    image = glance.add(4 * MIB + 99)
    mount = make_mount(glance)
    mount.fetch_all(image)
    # It came into use, so that the next daemon shows it in a listing.
    assert mount.path_of(image).read_bytes() == image.content
    assert mount.stop() == 0
    return mount, image


def test_full_disk_fails_no_read(
    small_disk: Path, make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I1] An image larger than the cache's disk is read rightly, twice; status says that the cache is full."""
    image = glance.add(24 * MIB)
    mount = make_mount(glance, cache_dir=small_disk, cache_free_min=0)
    path = mount.path_of(image)
    for _ in range(2):
        for start in range(0, 24 * MIB, MIB):
            assert read_direct(path, start, MIB) == image.content[start : start + MIB]
    wait_until(lambda: mount.status()["cache_is_full"], "the word that the cache is full", 20)
    assert mount.status_of(image)["present_bytes"] < 12 * MIB
    assert "full" in mount.log() or "No space left" in mount.log()
    assert "Traceback" not in mount.log()


def test_full_disk_drops_what_is_not_open(
    small_disk: Path, make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I7] For a new image one that is not open is dropped; the open one is kept, and all read rightly."""
    kept, dropped, new = (glance.add(3 * MIB) for _ in range(3))
    mount = make_mount(glance, cache_dir=small_disk, cache_size_max=8 * MIB)
    for image in (kept, dropped):
        mount.fetch_all(image)
    with mount.path_of(kept).open("rb"):
        assert mount.path_of(new).read_bytes() == new.content
        wait_until(
            lambda: not any(one["id"] == dropped.id for one in mount.status()["images"]), "the eviction", 30
        )
        assert mount.status_of(kept)["state"] == "whole"
        for image in (kept, dropped, new):
            assert mount.path_of(image).read_bytes() == image.content


def test_changed_chunk_is_fetched_again(stopped: tuple[Mount, ServedImage], glance: ServedGlance) -> None:
    """[I2] A bit that flipped on disk while the daemon was down is found, and its chunk fetched again."""
    mount, image = stopped
    (path,) = chunk_files(mount)
    damage(path, 20)
    asked = len(glance.data_requests(image))
    mount.start()
    assert read_direct(mount.path_of(image), 20 * CHUNK, CHUNK) == image.content[20 * CHUNK : 21 * CHUNK]
    assert len(glance.data_requests(image)) == asked + 1
    for start in range(0, len(image.content), MIB):
        assert read_direct(mount.path_of(image), start, MIB) == image.content[start : start + MIB]
    wait_until(lambda: mount.status_of(image)["state"] == "whole", "the chunk's return", 20)
    result = lazyimg("verify", image.id, "--control", mount.control)
    assert result.returncode == 0, result.stderr


@needs_resend
def test_daemon_killed_while_the_kernel_is_to_forget_pages_is_replaced(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I9] Damage is found while a read through the page cache waits, and the daemon dies: the next one answers.

    1. A chunk is stored, and changed on disk while no daemon runs.
    2. Glance stalls; a guest's buffered read of an absent chunk waits, its page locked by the kernel.
    3. The changed chunk is read and found: the kernel is to forget the image's pages.
    4. SIGKILL: the daemon ends, another takes over, and with Glance back both reads are right.
    """
    glance = make_glance()
    image = glance.add(8 * MIB)
    mount = make_mount(glance, hydrate=False)
    assert read_direct(mount.path_of(image), 0, CHUNK) == image.content[:CHUNK]
    assert mount.stop() == 0
    (path,) = chunk_files(mount)
    damage(path, 0)
    mount.start()
    glance.fail(FaultRule("stall", seconds=600))
    with ThreadPoolExecutor(1) as pool, mount.path_of(image).open("rb", buffering=0) as guest:
        buffered = pool.submit(os.pread, guest.fileno(), CHUNK, 4 * MIB)
        wait_until(lambda: mount.status_of(image).get("waiting_chunks"), "a read that waits", 20)
        direct = mount.read_later(image, 0, CHUNK)
        wait_until(lambda: "damaged chunks dropped" in mount.log(), "the damage found", 20)
        # Long enough for a thread of it to be in the kernel.
        time.sleep(0.5)
        mount.new_daemon(mount.kill_daemon())
        glance.fail()
        assert direct.result(30) == image.content[:CHUNK]
        assert buffered.result(30) == image.content[4 * MIB : 4 * MIB + CHUNK]


def test_zeroed_chunk_file_shows_no_zeros(stopped: tuple[Mount, ServedImage]) -> None:
    """[I1] A chunk file that lost all its bytes, at the same size, is not believed."""
    mount, image = stopped
    (path,) = chunk_files(mount)
    size_bytes = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size_bytes)
    mount.start()
    assert mount.path_of(image).read_bytes() == image.content


@pytest.mark.parametrize(
    "what", ["chunk file gone", "chunk file cut", "index gone", "index damaged", "all gone"]
)
def test_lost_cache_is_fetched_again(what: str, stopped: tuple[Mount, ServedImage]) -> None:
    """[I2] Whatever of the cache is lost while the daemon is down, it starts, and reads are right."""
    mount, image = stopped
    (path,) = chunk_files(mount)
    match what:
        case "chunk file gone":
            path.unlink()
        case "chunk file cut":
            os.truncate(path, 2 * MIB)
        case "index gone":
            shutil.rmtree(mount.cache_dir / "index")
        case "index damaged":
            (mount.cache_dir / "index" / "cache.db").write_bytes(b"no database" * 5000)
        case "all gone":
            shutil.rmtree(mount.cache_dir)
    mount.start()
    assert mount.path_of(image).read_bytes() == image.content
    wait_until(lambda: mount.status_of(image)["state"] == "whole", "the image", 20)


def test_what_a_killed_daemon_stored_is_right(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """[I2] After SIGKILL of everything in the middle of fetching, what the next daemon finds is right."""
    image = glance.add(64 * MIB)
    mount = make_mount(glance)
    reads = [mount.read_later(image, start, MIB) for start in range(0, 64 * MIB, MIB)]
    wait_until(lambda: sum(read.done() for read in reads) > 10, "some reads")
    mount.kill_everything()
    for read in reads:
        # Whatever became of it: its mount is dead.
        read.exception(30)
    mount.start()
    assert mount.path_of(image).read_bytes() == image.content
    result = lazyimg("verify", image.id, "--control", mount.control)
    assert result.returncode == 0, result.stderr
