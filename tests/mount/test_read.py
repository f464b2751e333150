"""Reads of an image through a real mount are the image's bytes, however they are made."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from real_mount import FUSE_TYPE, Mount, lazyimg, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage

pytestmark = pytest.mark.slow

CHUNK = 1 << 16
# Not a whole number of pages: the last chunk, page and sector are short.
LARGE_BYTES = 112 * MIB + 12345
SMALL_BYTES = 3 * MIB + 777


@pytest.fixture(scope="module")
def large(_shared_glance: ServedGlance) -> ServedImage:
    """An image that several tests read, each in its own way; later ones find more of it present."""
    return _shared_glance.add(LARGE_BYTES)


def qemu(*words: object) -> str:
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_random_reads_are_the_images_bytes(mounted: Mount, large: ServedImage) -> None:
    """[I1] 150 reads of any length anywhere, also across the end, equal the image's bytes."""
    dice = random.Random(1)
    with mounted.path_of(large).open("rb", buffering=0) as file:
        for _ in range(150):
            start = dice.randrange(LARGE_BYTES)
            size_bytes = int(2 ** dice.uniform(0, 20))
            assert os.pread(file.fileno(), size_bytes, start) == large.content[start : start + size_bytes]


def test_direct_reads_are_the_images_bytes(mounted: Mount, large: ServedImage) -> None:
    """[I1] Reads past the page cache, as qemu's with cache=none, equal the image's bytes, at its end too."""
    dice = random.Random(2)
    path = mounted.path_of(large)
    for _ in range(60):
        start = dice.randrange(0, LARGE_BYTES, 4096)
        size_bytes = dice.choice((4096, CHUNK, MIB))
        assert read_direct(path, start, size_bytes) == large.content[start : start + size_bytes]
    end = LARGE_BYTES & ~4095
    assert read_direct(path, end, 8192) == large.content[end:]


def test_several_readers_in_parallel_read_the_images_bytes(mounted: Mount, glance: ServedGlance) -> None:
    """[I1] Eight readers of one absent image, each in its own order, all read its bytes."""
    image = glance.add(16 * MIB + 5)
    path = mounted.path_of(image)

    def read_all(seed: int) -> bool:
        starts = list(range(0, len(image.content), 128 << 10))
        random.Random(seed).shuffle(starts)
        return all(read_direct(path, at, 128 << 10) == image.content[at : at + (128 << 10)] for at in starts)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read_all, range(8)))
    fetched_bytes = mounted.status_of(image)["fetched_bytes"]
    assert fetched_bytes == len(image.content), "single flight: each byte came once [I3]"


def test_sequential_read_is_the_image(mounted: Mount, large: ServedImage) -> None:
    """[I1] The whole image, read from start to end, is the image."""
    with mounted.path_of(large).open("rb") as file:
        at = 0
        while block := file.read(MIB):
            assert block == large.content[at : at + MIB]
            at += len(block)
    assert at == LARGE_BYTES


def test_mapped_memory_is_the_image(mounted: Mount, glance: ServedGlance) -> None:
    """[I1] An image mapped into memory has its bytes there."""
    image = glance.add(SMALL_BYTES)
    with (
        mounted.path_of(image).open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
    ):
        assert mapped[:] == image.content


def test_qemu_img_finds_the_same_image(
    mounted: Mount, large: ServedImage, tmp_path: Path, require: Callable[..., None]
) -> None:
    """[I1] qemu-img compares the mounted image with the original, and converts it, without a difference."""
    require("qemu-img")
    original, copy = tmp_path / "original", tmp_path / "copy"
    # qemu sees whole sectors.
    original.write_bytes(large.content.ljust(-(-LARGE_BYTES // 512) * 512, b"\0"))
    path = mounted.path_of(large)
    assert "identical" in qemu("qemu-img", "compare", "-f", "raw", "-F", "raw", path, original)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "raw", "-T", "none", path, copy)
    assert copy.read_bytes() == original.read_bytes()


def test_qemu_io_finds_patterns_where_they_are(
    mounted: Mount, glance: ServedGlance, require: Callable[..., None]
) -> None:
    """[I1] qemu-io, reading past the page cache, finds each chunk's own byte in it."""
    require("qemu-io")
    image = glance.add(b"".join(bytes([number]) * CHUNK for number in range(1, 41)))
    commands = [f"read -P {number} {(number - 1) * CHUNK} {CHUNK}" for number in range(1, 41)]
    random.Random(3).shuffle(commands)
    words = [word for command in commands for word in ("-c", command)]
    output = qemu("qemu-io", "-r", "-f", "raw", "-t", "none", *words, mounted.path_of(image))
    assert "verification failed" not in output
    assert output.count(f"read {CHUNK}/{CHUNK}") == 40


@pytest.mark.parametrize("size_bytes", [0, 1, 511, CHUNK - 1, CHUNK, CHUNK + 1])
def test_small_images_are_whole(mounted: Mount, glance: ServedGlance, size_bytes: int) -> None:
    """[I1] Images of less and little more than a chunk, an empty one too, read as they are."""
    image = glance.add(size_bytes)
    path = mounted.path_of(image)
    assert path.stat().st_size == size_bytes
    assert path.read_bytes() == image.content


def test_size_is_known_and_blocks_grow(mounted: Mount, glance: ServedGlance) -> None:
    """The first stat has the true size, and st_blocks tells what is here, as of a sparse file."""
    image = glance.add(8 * MIB)
    path = mounted.path_of(image)
    first = path.stat()
    assert first.st_size == 8 * MIB
    # What was judged is the first MiB.
    assert first.st_blocks * 512 <= MIB
    read_direct(path, 6 * MIB, 4096)
    grown = wait_until(
        lambda: path.stat().st_blocks > first.st_blocks and path.stat().st_blocks, "more blocks", 10
    )
    mounted.fetch_all(image)
    wait_until(lambda: path.stat().st_blocks * 512 == 8 * MIB, f"all blocks, {grown} before", 10)


def test_only_what_is_read_is_fetched(mounted: Mount, glance: ServedGlance) -> None:
    """One random read of 4 KiB fetches the judged first MiB and one request, no more."""
    image = glance.add(32 * MIB)
    path = mounted.path_of(image)
    assert read_direct(path, 20 * MIB, 4096) == image.content[20 * MIB :][:4096]
    assert mounted.status_of(image)["fetched_bytes"] <= MIB + (512 << 10)


def test_file_system_sizes_are_those_beneath(mounted: Mount) -> None:
    """statfs tells the size and the room of the folder beneath the mount."""
    shown, beneath = os.statvfs(mounted.path), os.statvfs(mounted.folder)
    assert (shown.f_blocks, shown.f_bsize, shown.f_files) == (
        beneath.f_blocks,
        beneath.f_bsize,
        beneath.f_files,
    )
    assert shown.f_bavail > 0


def test_mtime_sticks_across_a_restart(glance: ServedGlance, make_mount: Callable[..., Mount]) -> None:
    """os.utime, which Nova calls at each use, sets an mtime that the next daemon still shows."""
    image = glance.add(SMALL_BYTES)
    mount = make_mount(glance)
    path = mount.path_of(image)
    os.utime(path, (1_000_000_000, 1_234_567_890.5))
    assert path.stat().st_mtime == 1_234_567_890.5
    os.utime(path)
    now = path.stat().st_mtime_ns
    assert now > 1_600_000_000 * 10**9
    assert mount.stop() == 0
    mount.start()
    assert path.stat().st_mtime_ns == now


def test_nothing_can_be_changed(mounted: Mount, glance: ServedGlance) -> None:
    """Opening an image for writing is refused with EROFS, truncating, chmod and chown with EPERM; nothing changes."""
    image = glance.add(SMALL_BYTES)
    path = mounted.path_of(image)
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        with pytest.raises(OSError, match="Read-only file system"):
            os.open(path, flags)
    attempts: list[Callable[[], object]] = [
        lambda: os.truncate(path, 0),
        lambda: os.chmod(path, 0o600),
        lambda: os.chown(path, 1, 1),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionError, match="Operation not permitted"):
            attempt()
    assert path.read_bytes() == image.content


def test_mount_has_its_options(mounted: Mount) -> None:
    """The mount is nosuid, nodev and open to other users, and its read-ahead is raised."""
    fields = next(
        line.split() for line in Path("/proc/mounts").read_text().splitlines() if f" {mounted.path} " in line
    )
    assert fields[2] == FUSE_TYPE
    assert {"rw", "nosuid", "nodev", "allow_other"} <= set(fields[3].split(","))
    device = os.stat(mounted.path).st_dev
    read_ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
    assert int(read_ahead) == 1024


def test_verify_agrees_with_glance(mounted: Mount, large: ServedImage) -> None:
    """`lazyimg prefetch` and `lazyimg verify` find a whole image whose hash is Glance's, and status says whole."""
    assert lazyimg("prefetch", large.id, "--control", mounted.control).returncode == 0
    result = lazyimg("verify", large.id, "--control", mounted.control)
    assert result.returncode == 0, result.stderr
    assert "matches Glance's hash" in result.stdout
    status = mounted.status_of(large)
    assert (status["state"], status["present_bytes"]) == ("whole", LARGE_BYTES)
