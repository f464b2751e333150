"""Names that images and real files both could have: who has them, and what making, renaming and removing do."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from real_mount import Mount, wait_until
from served_glance import MIB, ServedGlance, ServedImage

from lazyimg.daemon import linux

pytestmark = pytest.mark.slow


@pytest.fixture
def image(mounted: Mount, glance: ServedGlance) -> ServedImage:
    """An image that is in use in the mount."""
    image = glance.add(MIB + 5)
    assert mounted.path_of(image).read_bytes() == image.content
    assert image.base_name in os.listdir(mounted.path)
    return image


def is_known(mount: Mount, image: ServedImage) -> bool:
    return any(one["id"] == image.id for one in mount.status()["images"])


def test_rename_onto_an_image_replaces_it_at_once(mounted: Mount, image: ServedImage) -> None:
    """[I10] A real file renamed to an image's name is what is found there; who has the image open keeps it."""
    path = mounted.path_of(image)
    part = mounted.path / f"{image.base_name}.part"
    part.write_bytes(b"Nova's own")
    with path.open("rb") as opened:
        part.rename(path)
        assert path.read_bytes() == b"Nova's own"
        assert opened.read() == image.content
    assert os.listdir(mounted.path).count(image.base_name) == 1
    wait_until(lambda: not is_known(mounted, image), "the end of the image's chunks")
    path.unlink()
    assert image.base_name not in os.listdir(mounted.path)
    assert path.read_bytes() == image.content


def test_rename_flags_keep_to_an_image(mounted: Mount, image: ServedImage) -> None:
    """An image is neither replaced by RENAME_NOREPLACE nor exchanged, and it keeps its name."""
    path = mounted.path_of(image)
    other = mounted.path / f"{image.base_name}.other"
    other.write_bytes(b"real")

    def rename(old: os.PathLike[str], new: os.PathLike[str], flags: int) -> None:
        linux.rename(-1, os.fsencode(old), -1, os.fsencode(new), flags)

    with pytest.raises(FileExistsError):
        rename(other, path, linux.RENAME_NOREPLACE)
    for old, new, flags in (
        (other, path, linux.RENAME_EXCHANGE),
        (path, other, linux.RENAME_EXCHANGE),
        (path, other, 0),
    ):
        with pytest.raises(PermissionError):
            rename(old, new, flags)
    # RENAME_WHITEOUT is of overlayfs's making.
    with pytest.raises(OSError, match="Invalid argument"):
        rename(other, mounted.path / "third", 4)
    assert other.read_bytes() == b"real"
    assert path.read_bytes() == image.content


def test_nothing_is_made_over_an_image(mounted: Mount, image: ServedImage) -> None:
    """Whatever would make a file of an image's name finds it there."""
    path = mounted.path_of(image)
    other = mounted.path / f"{image.base_name}.other"
    other.write_bytes(b"real")
    makings: list[Callable[[], object]] = [
        lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
        lambda: os.mkdir(path),
        lambda: os.mkfifo(path),
        lambda: os.symlink("x", path),
        lambda: os.link(other, path),
    ]
    for make in makings:
        with pytest.raises(FileExistsError):
            make()
    assert path.read_bytes() == image.content


def test_file_is_made_where_no_image_is_shown(mounted: Mount, glance: ServedGlance) -> None:
    """[I10] Nova's plain open("wb") after os.path.exists said no makes a real file, which stays when an image comes."""
    refused = glance.add(b"KDMV" + bytes(100_000), disk_format="vmdk")
    path = mounted.path_of(refused)
    assert not path.exists()
    path.write_bytes(b"converted by Nova")
    assert path.read_bytes() == b"converted by Nova"
    assert refused.base_name in os.listdir(mounted.path)
    path.unlink()
    assert not path.exists()


def test_unlinked_image_is_hidden_and_its_chunks_go(mounted: Mount, image: ServedImage) -> None:
    """unlink takes an image out of the listing at once, its chunks with the last handle; it can be found again."""
    path = mounted.path_of(image)
    os.utime(path, ns=(10**18, 10**18))
    with path.open("rb") as opened:
        path.unlink()
        assert image.base_name not in os.listdir(mounted.path)
        assert opened.read() == image.content
        assert is_known(mounted, image)
    wait_until(lambda: not is_known(mounted, image), "the end of the image's chunks")
    assert path.stat().st_mtime_ns != 10**18, "its next use is its first"
    assert image.base_name not in os.listdir(mounted.path), "looked up is not used"
    assert path.read_bytes() == image.content
    assert image.base_name in os.listdir(mounted.path)


def test_image_opened_again_after_unlink_keeps_its_chunks(mounted: Mount, image: ServedImage) -> None:
    """An unlinked image that is opened again before its last handle is released is in use."""
    path = mounted.path_of(image)
    with path.open("rb"):
        path.unlink()
        with path.open("rb") as again:
            assert again.read() == image.content
    assert image.base_name in os.listdir(mounted.path)
    assert mounted.status_of(image)["present_bytes"] == len(image.content)


def test_unlinked_image_that_glance_lacks_keeps_its_chunks(
    mounted: Mount, glance: ServedGlance, image: ServedImage
) -> None:
    """[I7] What Glance no longer has is hidden by unlink, and not dropped."""
    path = mounted.path_of(image)
    glance.delete(image)
    path.unlink()
    assert image.base_name not in os.listdir(mounted.path)
    wait_until(lambda: mounted.status_of(image)["state"] == "gone", "the state to be known")
    assert path.read_bytes() == image.content


def test_link_from_an_id_cannot_be_removed(mounted: Mount, image: ServedImage) -> None:
    """The link from an image's id is not the folder's to remove."""
    link = mounted.path / image.id
    assert link.read_bytes() == image.content
    with pytest.raises(PermissionError):
        link.unlink()


def test_listing_holds_while_names_come_and_go(mounted: Mount) -> None:
    """A listing under way shows each name that stays exactly once, whatever is made and removed meanwhile."""
    folder = mounted.path / "listed"
    folder.mkdir()
    stay = {f"stay{number:04}" for number in range(600)}
    for name in stay | {f"go{number:04}" for number in range(600)}:
        (folder / name).touch()
    seen: list[str] = []
    with os.scandir(folder) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            (folder / f"new{number}").touch()
            if number < 600:
                (folder / f"go{number:04}").unlink()
    assert stay <= set(seen)
    assert len(seen) == len(set(seen))
