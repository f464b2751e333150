"""Which names a mount has: an image's hash, its id for people, and whatever real files are beneath."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Callable

import pytest
from real_mount import Mount, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


def absent_name() -> str:
    """Return the name of an image that no Glance has."""
    return hashlib.sha1(str(uuid.uuid4()).encode()).hexdigest()


def test_image_has_its_hash_as_name(mounted: Mount, glance: ServedGlance) -> None:
    """An image is sha1(image id), a regular file that all may read and its owner could write, as Nova makes it."""
    image = glance.add(MIB)
    path = mounted.path / hashlib.sha1(image.id.encode()).hexdigest()
    assert path.stat().st_mode == 0o100644
    assert path.read_bytes() == image.content


def test_image_id_is_a_link_to_the_name(mounted: Mount, glance: ServedGlance) -> None:
    """For people, an image's id is a symbolic link to its name, and is not listed."""
    image = glance.add(MIB)
    path = mounted.path / image.id
    assert os.readlink(path) == image.base_name
    assert path.lstat().st_size == len(image.base_name)
    assert path.read_bytes() == image.content
    assert image.id not in os.listdir(mounted.path)


def test_image_uploaded_now_is_found_at_once(mounted: Mount, glance: ServedGlance) -> None:
    """An image that came after the last list of images was read is found by its first lookup."""
    older = glance.add(1000)
    assert mounted.path_of(older).read_bytes() == older.content
    newer = glance.add(2000)
    assert mounted.path_of(newer).read_bytes() == newer.content


def test_unknown_names_are_absent(mounted: Mount) -> None:
    """A hash and an id that Glance does not know are ENOENT."""
    for name in (absent_name(), str(uuid.uuid4())):
        with pytest.raises(FileNotFoundError):
            (mounted.path / name).stat()


@pytest.mark.parametrize(
    "name",
    [
        "z" * 40,
        "A" * 40,
        "a" * 39,
        "a" * 41,
        f"{'a' * 40}.part",
        f"{'a' * 40}_20",
        "ephemeral_1_abcdef0",
        "0123",
        hashlib.sha1(b"").hexdigest(),
    ],
)
def test_other_names_are_absent_without_a_call(mounted: Mount, glance: ServedGlance, name: str) -> None:
    """What cannot be an image's name is ENOENT and nothing is asked of Glance; sha1("") neither."""
    count = len(glance.list_requests())
    with pytest.raises(FileNotFoundError):
        (mounted.path / name).stat()
    assert len(glance.list_requests()) == count


def test_absence_is_not_believed_for_long(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """A name that was absent is looked up again by the kernel, and found soon after its image came."""
    glance = make_glance()
    mount = make_mount(glance, negative_ttl=0.2)
    image_id = glance.add_queued()
    path = mount.path / hashlib.sha1(image_id.encode()).hexdigest()
    assert not path.exists()
    glance.upload(image_id, b"now it is here" * 1000)
    wait_until(path.exists, "the name of the image that is active now", 20)
    assert path.read_bytes() == b"now it is here" * 1000


def test_misses_ask_glance_once(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I5] A name that is looked up again and again while it is absent costs one list, not one a lookup."""
    # Of its own: the other mounts of a shared one ask for its list now and then.
    glance = make_glance()
    mount = make_mount(glance, negative_ttl=60)
    name = absent_name()
    count = len(glance.list_requests())
    for _ in range(20):
        assert not (mount.path / name).exists()
    # One list is two requests: hidden images are listed apart.
    assert len(glance.list_requests()) - count <= 2


def test_listing_shows_what_is_used(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """A listing has the upper folder's names and the images opened or touched here, after a restart too."""
    seen, opened, touched = glance.add(1000), glance.add(1000), glance.add(1000)
    mount = make_mount(glance, start=False)
    (mount.path / "swap_64").write_bytes(b"swap")
    mount.start()
    mount.path_of(seen).stat()
    mount.path_of(opened).read_bytes()
    os.utime(mount.path_of(touched))
    expected = {"swap_64", opened.base_name, touched.base_name}
    assert set(os.listdir(mount.path)) == expected
    assert mount.stop() == 0
    mount.start()
    assert set(os.listdir(mount.path)) == expected


def test_image_that_is_gone_from_glance_keeps_its_name(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I7] A wholly present image that Glance no longer has stays readable, and is not evicted."""
    image = glance.add(2 * MIB)
    mount = make_mount(glance)
    mount.fetch_all(image)
    glance.delete(image)
    assert mount.path_of(image).read_bytes() == image.content
    with pytest.raises(Exception, match="no longer has it") as caught:
        mount.client().evict(image.id)
    assert getattr(caught.value, "exit_code", None) == 5
    assert mount.stop() == 0
    mount.start()
    assert mount.path_of(image).read_bytes() == image.content


def test_evicted_image_is_found_again(mounted: Mount, glance: ServedGlance) -> None:
    """An evicted image is fetched anew at its next use, under the same name."""
    image = glance.add(2 * MIB)
    path = mounted.path_of(image)
    mounted.fetch_all(image)
    inode = path.stat().st_ino
    count = len(glance.data_requests(image))
    assert mounted.client().evict(image.id) >= 2 * MIB
    assert path.read_bytes() == image.content
    assert path.stat().st_ino == inode, "the number is a function of the image"
    # Whether the kernel still had the bytes in its own cache does not matter: the name was judged anew.
    assert len(glance.data_requests(image)) > count


def test_image_keeps_name_owner_and_content(mounted: Mount, glance: ServedGlance) -> None:
    """An image cannot be renamed, linked, resized, given away or its mode changed: EPERM, as if immutable."""
    image = glance.add(1000)
    path = mounted.path_of(image)
    path.stat()
    attempts: list[Callable[[], object]] = [
        lambda: path.rename(mounted.path / "other"),
        lambda: os.link(path, mounted.path / "other"),
        lambda: path.chmod(0o755),
        lambda: os.chown(path, 1, 1),
        lambda: os.truncate(path, 0),
    ]
    for attempt in attempts:
        with pytest.raises(PermissionError) as caught:
            attempt()
        assert caught.value.errno == errno.EPERM
    assert path.read_bytes() == image.content
    assert "other" not in os.listdir(mounted.path)
