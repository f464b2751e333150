"""What of the cache is lost or spoiled while nobody runs, seen through a real mount, with Glance down where it can be.

Expected each time:

    the index gone                          rebuilt from the sidecars: names found and bytes read, no Glance needed
    one image's chunk file cut or swapped   that image is fetched again, others are read without Glance
    everything killed                       nothing that was committed is fetched again
    power lost, under a mount               in each state the disk may be in: the mount starts, all bytes are right,
                                            and what was committed is not fetched again
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from crash_states import FATES, CrashDisk, Fate, Record, write_tree
from faulty_disk import FaultyDisk
from qcow2_writer import Geometry, Kind, write_image
from real_mount import Mount, read_direct
from served_glance import MIB, ServedGlance, ServedImage

pytestmark = pytest.mark.slow

CHUNK = 1 << 16
SEED = int(os.environ.get("POWER_LOSS_SEED", "1"))
# States that are mounted; tests/fault/test_power_loss.py opens many more without a mount.
MOUNTED_STATES = int(os.environ.get("POWER_LOSS_MOUNTED_STATES", "2"))
QCOW2_CLUSTERS = 32


def add_qcow2(glance: ServedGlance) -> tuple[ServedImage, bytes]:
    """Upload a qcow2; return it and the bytes its guest sees."""
    kinds: list[Kind] = ["data", "compressed", "zero"]
    geometry = Geometry(virtual_size_bytes=QCOW2_CLUSTERS * CHUNK, cluster_bits=16)
    guest = {index: kinds[index % 3] for index in range(0, QCOW2_CLUSTERS - 4)}
    made = write_image(geometry, guest, seed=SEED)
    return glance.add(made.source, "qcow2"), made.read(0, QCOW2_CLUSTERS * CHUNK)


def test_lost_index_needs_no_glance(
    make_glance: Callable[..., ServedGlance], make_mount: Callable[..., Mount]
) -> None:
    """[I9] A raw image and a decoded one are found by name and read rightly with the index lost and Glance down."""
    glance = make_glance()
    raw = glance.add(2 * MIB + 99)
    contents = dict([(raw, raw.content), add_qcow2(glance)])
    mount = make_mount(glance, view="raw")
    for image, content in contents.items():
        assert mount.path_of(image).read_bytes() == content
        mount.fetch_all(image)
    assert mount.stop() == 0
    shutil.rmtree(mount.cache_dir / "index")
    glance.stop()
    mount.start()
    assert {image.base_name for image in contents} <= set(os.listdir(mount.path))
    for image, content in contents.items():
        assert mount.path_of(image).read_bytes() == content
    assert "rebuilt from sidecars: 2 images" in mount.log()


def test_spoiled_chunk_files_are_not_in_the_way_of_others(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I1] Two files swapped and one cut short cost their own images a fetch, counted in status, and others none."""
    images = [glance.add(MIB) for _ in range(4)]
    mount = make_mount(glance)
    files: dict[ServedImage, Path] = {}
    for image in images:
        mount.fetch_all(image)
        (files[image],) = set((mount.cache_dir / "chunks").iterdir()) - set(files.values())
    assert mount.stop() == 0
    swapped, other, cut, _ = images
    between = mount.folder / "between"
    files[swapped].rename(between)
    files[other].rename(files[swapped])
    between.rename(files[other])
    os.truncate(files[cut], MIB // 2)
    asked = {image: len(glance.data_requests(image)) for image in images}
    mount.start()
    for image in images:
        assert mount.path_of(image).read_bytes() == image.content
    assert [len(glance.data_requests(image)) > asked[image] for image in images] == [True, True, True, False]
    assert [mount.status_of(image)["damaged_chunks"] for image in images] == [16, 16, 0, 0]
    assert "damaged chunks dropped" in mount.log()
    assert "it has 524288 bytes, not 1048576" in mount.log()


def test_nothing_committed_is_fetched_again_after_everything_was_killed(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I9] Holder and daemon killed with -9: an image that was whole is read without a request."""
    image, half = glance.add(4 * MIB + 99), glance.add(8 * MIB)
    mount = make_mount(glance)
    mount.fetch_all(image)
    later = [mount.read_later(half, start, CHUNK) for start in range(0, 8 * MIB, MIB)]
    mount.kill_everything()
    for read in later:
        read.exception(30)
    asked = len(glance.data_requests(image))
    mount.start()
    assert mount.path_of(image).read_bytes() == image.content
    assert mount.path_of(half).read_bytes() == half.content
    assert len(glance.data_requests(image)) == asked


def test_power_loss_under_a_mount(
    memory_path: Path, glance: ServedGlance, make_mount: Callable[..., Mount]
) -> None:
    """[I2] States that power loss can leave of a cache in use are mounted: right bytes, nothing committed lost."""
    images = [glance.add(MIB + 99) for _ in range(3)]
    records = recorded_life(memory_path, glance, images, make_mount)
    committed_at = next(at for at, record in enumerate(records) if record[0] == "mark")
    points: list[tuple[int, Fate]] = [(at, fate) for at in range(1, len(records)) for fate in FATES]
    chosen = random.Random(SEED).sample(points, MOUNTED_STATES)
    for number, (at, fate) in enumerate(chosen):
        disk = CrashDisk()
        for record in records[:at]:
            disk.play(record)
        folder = memory_path / f"state{number}"
        write_tree(disk.crash(fate, random.Random(SEED)), folder)
        asked = len(glance.data_requests(images[0]))
        mount = make_mount(glance, f"m{number}", cache_dir=folder / "cache")
        where = f"POWER_LOSS_SEED={SEED}, after operation {at}: {fate}"
        for image in images:
            assert mount.path_of(image).read_bytes() == image.content, where
        assert at <= committed_at or len(glance.data_requests(images[0])) == asked, where
        assert "set aside" not in mount.log(), where
        mount.end()


def recorded_life(
    folder: Path, glance: ServedGlance, images: list[ServedImage], make_mount: Callable[..., Mount]
) -> list[Record]:
    """Return what a mount wrote to its cache's disk: an image fetched whole and marked so, others read and dropped."""
    disk = FaultyDisk(folder, folder / "record")
    try:
        mount = make_mount(glance, "recorded", cache_dir=disk.path / "cache")
        mount.fetch_all(images[0])
        disk.mark("committed")
        for start in range(0, MIB, 4 * CHUNK):
            for image in images[1:]:
                assert read_direct(mount.path_of(image), start, CHUNK) == image.content[start : start + CHUNK]
        mount.client().evict(images[1].id)
        mount.path_of(images[1]).read_bytes()
        assert mount.stop() == 0
        return list(disk.records())
    finally:
        disk.end()
