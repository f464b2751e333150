"""The real folder beneath the mount stays what it was: its files are seen, read, and win over images."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable

import pytest
from real_mount import Mount, read_direct, wait_until
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow


@pytest.fixture
def mount(make_mount: Callable[..., Mount], glance: ServedGlance) -> Mount:
    """A mount over a folder that is still to be filled, and not started."""
    return make_mount(glance, start=False)


def test_real_file_wins_over_an_image(mount: Mount, glance: ServedGlance) -> None:
    """[I10] Under the name of an image a real file is what it was, before, during and after the mount."""
    image = glance.add(MIB)
    path = mount.path_of(image)
    path.write_bytes(b"Nova's own")
    mount.start()
    assert path.read_bytes() == b"Nova's own"
    assert os.listdir(mount.path) == [image.base_name]
    assert not glance.data_requests(image)
    assert mount.stop() == 0
    assert path.read_bytes() == b"Nova's own"


def test_real_file_that_comes_later_wins(mount: Mount, glance: ServedGlance) -> None:
    """[I10] A real file that takes an image's name beneath the mount is what is found from then on."""
    image = glance.add(MIB)
    beneath = os.open(mount.path, os.O_PATH)
    try:
        mount.start()
        path = mount.path_of(image)
        assert path.read_bytes() == image.content
        with open(os.open(image.base_name, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=beneath), "wb") as file:
            file.write(b"Nova's own")
    finally:
        os.close(beneath)
    # The kernel may believe an entry for a second.
    wait_until(lambda: path.stat().st_size == len(b"Nova's own"), "the real file", 10)
    assert path.read_bytes() == b"Nova's own"
    assert os.listdir(mount.path) == [image.base_name]


def test_upper_files_are_read_as_they_are(mount: Mount) -> None:
    """Content, mode, owner and times of a file beneath are the same through the mount, O_DIRECT or not."""
    content = os.urandom(3 * MIB + 5)
    path = mount.path / "swap_512"
    path.write_bytes(content)
    path.chmod(0o640)
    os.chown(path, 12, 34)
    os.utime(path, ns=(10**18, 10**18 + 7))
    before = path.stat()
    mount.start()
    after = path.stat()
    for name in ("st_mode", "st_uid", "st_gid", "st_size", "st_nlink", "st_mtime_ns", "st_blocks"):
        assert getattr(after, name) == getattr(before, name), name
    assert path.read_bytes() == content
    assert read_direct(path, MIB, 65536) == content[MIB : MIB + 65536]


def test_folders_and_links_are_what_they_are(mount: Mount) -> None:
    """Folders can be walked, links followed, and a listing tells each entry's kind."""
    (mount.path / "folder" / "below").mkdir(parents=True)
    (mount.path / "folder" / "below" / "file").write_bytes(b"deep")
    (mount.path / "link").symlink_to("folder/below/file")
    (mount.path / "nowhere").symlink_to("/nonesuch")
    mount.start()
    assert (mount.path / "link").read_bytes() == b"deep"
    assert os.readlink(mount.path / "nowhere") == "/nonesuch"
    assert [sorted(found[1] + found[2]) for found in os.walk(mount.path)] == [
        ["folder", "link", "nowhere"],
        ["below"],
        ["file"],
    ]
    kinds = {
        entry.name: stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) for entry in os.scandir(mount.path)
    }
    assert kinds == {"folder": stat.S_IFDIR, "link": stat.S_IFLNK, "nowhere": stat.S_IFLNK}


def test_long_listing_is_complete(mount: Mount) -> None:
    """A folder whose listing needs many requests shows each name once, odd bytes included."""
    names = {f"{number:05}-{'x' * 60}".encode() for number in range(1500)} | {b"odd \xff name", b"new\nline"}
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(mount.path), name), os.O_CREAT | os.O_WRONLY))
    mount.start()
    found = os.listdir(os.fsencode(mount.path))
    assert len(found) == len(names)
    assert set(found) == names


def test_images_are_not_found_in_subfolders(mount: Mount, glance: ServedGlance) -> None:
    """Images are in the root alone; a subfolder has what is beneath."""
    image = glance.add(1000)
    (mount.path / "folder").mkdir()
    mount.start()
    assert mount.path_of(image).exists()
    assert not (mount.path / "folder" / image.base_name).exists()


def test_file_others_may_not_read_stays_closed(mount: Mount, require: Callable[..., None]) -> None:
    """Permissions beneath hold through the mount: the kernel checks them for other users."""
    require("setpriv")
    path = mount.path / "secret"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    (mount.path / "open").write_bytes(b"for all")
    mount.start()
    # Given the open folder, so that the ones above it, pytest's own, need not be open to all.
    folder = os.open(mount.path, os.O_PATH)
    command = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat"]
    try:
        results = [
            subprocess.run(
                [*command, f"/proc/self/fd/{folder}/{name}"],
                cwd="/",
                pass_fds=[folder],
                capture_output=True,
                text=True,
                check=False,
            )
            for name in ("secret", "open")
        ]
    finally:
        os.close(folder)
    assert "Permission denied" in results[0].stderr
    assert results[1].stdout == "for all"
