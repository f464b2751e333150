"""A file's descriptor: open while it is used, given back while it is not, and never another file's."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from image_fakes import ImageRig
from store_images import content

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.descriptor import Descriptor, DescriptorLimit
from lazyimg.store.folder import PrivateFolder

DATA = b"0123456789"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tmp_path.chmod(0o700)
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def descriptor(path: Path) -> Iterator[Descriptor]:
    folder = PrivateFolder.open(path.parent)
    descriptor = Descriptor(folder, path.name, len(DATA), DescriptorLimit(1))
    yield descriptor
    descriptor.close()
    folder.close()


def read(descriptor: Descriptor) -> bytes:
    with descriptor.in_use() as fd:
        return os.pread(fd, 100, 0)


def take(descriptor: Descriptor) -> bool:
    """Take the descriptor away if it is idle."""
    fd = descriptor.take_idle()
    if fd is not None:
        os.close(fd)
    return fd is not None


def test_file_is_opened_when_it_is_used(descriptor: Descriptor) -> None:
    """Until its first use a file takes no descriptor; then it keeps one."""
    assert descriptor.number == -1
    assert read(descriptor) == DATA
    number = descriptor.number
    assert number >= 0
    assert read(descriptor) == DATA
    assert descriptor.number == number


def test_idle_descriptor_is_given_back_and_comes_again(descriptor: Descriptor) -> None:
    """Only what was not used since the last look is taken; the next use opens the file again."""
    assert read(descriptor) == DATA
    assert not take(descriptor)
    assert read(descriptor) == DATA
    assert not take(descriptor)
    assert take(descriptor)
    assert descriptor.number == -1
    assert not take(descriptor)
    assert read(descriptor) == DATA


def test_descriptor_in_use_is_not_taken(descriptor: Descriptor) -> None:
    """While a thread uses it, it stays, however long that takes."""
    with descriptor.in_use() as fd:
        for _ in range(3):
            assert not take(descriptor)
        assert os.pread(fd, 100, 0) == DATA


@pytest.mark.parametrize("change", ["another file", "a link", "cut", "gone"])
def test_another_file_under_its_name_is_not_read(descriptor: Descriptor, path: Path, change: str) -> None:
    """[I1] What lies under the name now is not taken for the file that was opened first."""
    assert read(descriptor) == DATA
    take(descriptor)
    assert take(descriptor)
    if change == "cut":
        os.truncate(path, 5)
    else:
        path.rename(path.with_name("old"))
    if change == "another file":
        path.write_bytes(DATA)
    elif change == "a link":
        path.symlink_to("old")
    with pytest.raises(OSError, match=r"not the file it was|No such file|symbolic links"):
        read(descriptor)
    assert descriptor.number == -1


def test_closed_file_is_not_opened_again(descriptor: Descriptor) -> None:
    """Once closed for good, a use fails; a user inside ends first."""
    with descriptor.in_use() as fd:
        descriptor.close()
        assert os.pread(fd, 100, 0) == DATA
    assert descriptor.number == -1
    with pytest.raises(OSError, match="closed"):
        read(descriptor)
    descriptor.close()


def test_read_only_file_becomes_writable_under_its_number(
    descriptor: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a read-only disk a file is read; once that can be written the same number can be too."""
    really_open = os.open

    def read_only(path: str, flags: int, mode: int, *, dir_fd: int) -> int:
        if flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "injected")
        return really_open(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        assert read(descriptor) == DATA
        with descriptor.in_use() as fd, pytest.raises(OSError, match="injected"):
            descriptor.make_writable(fd)
    with descriptor.in_use() as fd:
        descriptor.make_writable(fd)
        assert descriptor.number == fd
        assert os.pwrite(fd, b"x", 0) == 1
    assert read(descriptor) == b"x" + DATA[1:]


def test_file_above_the_limit_is_opened_for_each_use(descriptor: Descriptor, path: Path) -> None:
    """[I5] Where as many files as may have a descriptor, another is read all the same and keeps none."""
    other_path = path.with_name("other")
    other_path.write_bytes(DATA[::-1])
    folder = PrivateFolder.open(path.parent)
    other = Descriptor(folder, "other", len(DATA), descriptor._limit)
    assert read(descriptor) == DATA
    assert read(other) == DATA[::-1]
    assert other.number == -1
    for _ in range(2):
        take(descriptor)
    assert read(other) == DATA[::-1]
    assert other.number >= 0
    assert read(descriptor) == DATA
    assert descriptor.number == -1
    other.close()
    assert read(descriptor) == DATA
    assert descriptor.number >= 0
    folder.close()


# ── of many images ──


@pytest.mark.slow
async def test_open_files_stay_below_their_limit(tmp_path: Path, nursery: trio.Nursery) -> None:
    """[I5] Of more images than may be open the idle ones give their descriptors back, and all are read rightly."""
    cache = CacheDir(tmp_path / "cache", files_max=16)
    rig = ImageRig(cache, nursery, open_files_max=16)
    catalog = rig.catalog()
    images: list[LazyImage] = []
    for number in range(24):
        record = rig.glance.add(number, 2 * CHUNK)
        image = await catalog.lookup(record.base_name)
        assert image is not None
        image.opened()
        images.append(image)
        await rig.wait_written()
        await image.commit()
    await catalog.tidy()
    assert sum(image.has_descriptor for image in images) <= 16
    for number, image in enumerate(images):
        assert await image.read(0, 2 * CHUNK) == content(number, 0, 2 * CHUNK)
    assert sum(image.has_descriptor for image in images) == 16
    await catalog.tidy()
    assert sum(image.has_descriptor for image in images) == 14
    for number, image in enumerate(images):
        data = image.read_nowait(CHUNK, CHUNK)
        assert data is None if not image.has_descriptor else data == content(number, CHUNK, 2 * CHUNK)
    cache.close()


async def test_file_with_unsynced_chunks_keeps_its_descriptor(tmp_path: Path, nursery: trio.Nursery) -> None:
    """[I2] Until its commit a file stays open: the kernel tells of a failed write-back only who had it open."""
    cache = CacheDir(tmp_path / "cache")
    rig = ImageRig(cache, nursery)
    image = rig.add(1, 2 * CHUNK)
    await image.read(0, 2 * CHUNK)
    await rig.wait_written()
    for _ in range(3):
        assert image.take_idle_descriptor() is None
    await image.commit()
    assert image.take_idle_descriptor() is None
    number = image.take_idle_descriptor()
    assert number is not None
    os.close(number)
    assert await image.read(0, CHUNK) == content(1, 0, CHUNK)
    cache.close()
