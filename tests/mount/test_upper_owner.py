"""What a user makes in the mount is his from its first instant, and what he may not do he cannot do there either."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acting_user import NOBODY, run_as
from real_mount import Mount
from served_glance import ServedGlance

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(mounted: Mount, tmp_path: Path) -> Iterator[Path]:
    """A folder of user 65534's own in the mount."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to act as others")
    path = mounted.path / tmp_path.name
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    return path


MAKING = """
os.close(os.open("file", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
os.mkdir("folder", 0o777)
os.symlink("file", "symlink")
os.mkfifo("pipe", 0o666)
os.mknod("node", 0o666 | stat.S_IFREG)
result = {name: owned(name) for name in ("file", "folder", "symlink", "pipe", "node")}
"""


@pytest.mark.parametrize("umask", [0, 0o022, 0o027, 0o777])
def test_everything_made_is_the_makers_own(folder: Path, umask: int) -> None:
    """Files, folders, links and pipes have their maker's ids, and the mode his umask leaves."""
    made = run_as(folder, MAKING, gid=4321, umask=umask)
    file, directory = oct(0o666 & ~umask), oct(0o777 & ~umask)
    modes = {"file": file, "folder": directory, "symlink": "0o777", "pipe": file, "node": file}
    assert made == {name: [NOBODY, 4321, mode] for name, mode in modes.items()}


def test_folder_with_setgid_gives_its_group(folder: Path) -> None:
    """In a set-group-ID folder new files have its group, new folders the bit too."""
    os.chown(folder, NOBODY, 777)
    folder.chmod(0o2775)
    made = run_as(folder, MAKING, umask=0o002)
    assert {group for _, group, _ in made.values()} == {777}
    assert made["folder"] == [NOBODY, 777, "0o2775"]


def test_supplementary_groups_open_what_they_open(folder: Path) -> None:
    """A folder of a group is open to its members, whichever of their groups it is, and to nobody else."""
    os.chown(folder, 0, 555)
    folder.chmod(0o770)
    program = 'result = [attempt(os.mkdir, "x"), attempt(os.chown, "x", -1, 555)]'
    assert run_as(folder, program) == ["EACCES", "EACCES"]
    assert run_as(folder, program, groups=[555]) == [None, None]
    assert (folder / "x").stat().st_gid == 555
    program = 'result = attempt(os.chown, "x", -1, 556)'
    assert run_as(folder, program, groups=[555]) == "EPERM", "to a group one is not in"


def test_nobody_sees_a_file_of_roots(folder: Path) -> None:
    """While a user makes files, no look at the real folder ever finds one that is not his."""
    seen: set[int] = set()
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            for entry in os.scandir(folder):
                try:
                    seen.add(entry.stat(follow_symlinks=False).st_uid)
                except FileNotFoundError:
                    continue

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        program = """
for number in range(200):
    os.close(os.open(f"f{number}", os.O_CREAT | os.O_WRONLY))
    os.mkdir(f"d{number}")
    os.unlink(f"f{number}")
result = None
"""
        run_as(folder, program)
    finally:
        done.set()
        watcher.join()
    assert seen == {NOBODY}


def test_others_may_not(folder: Path) -> None:
    """Another user's file cannot be read, written, changed, removed or given away where its mode says so."""
    secret = folder / "secret"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    folder.chmod(0o755)
    program = """
result = [
    attempt(open, "secret"),
    attempt(open, "secret", "ab"),
    attempt(open, "new", "wb"),
    attempt(os.unlink, "secret"),
    attempt(os.rename, "secret", "other"),
    attempt(os.chmod, "secret", 0o666),
    attempt(os.chown, "secret", 1234, 1234),
    attempt(os.utime, "secret"),
    attempt(os.utime, "secret", (1, 1)),
    attempt(os.truncate, "secret", 0),
    attempt(os.mknod, "device", 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
]
"""
    assert run_as(folder, program, uid=1234, gid=1234) == [*["EACCES"] * 5, *["EPERM"] * 2,
                                                           "EACCES", "EPERM", "EACCES", "EACCES"]  # fmt: skip
    assert secret.read_bytes() == b"secret"


def test_sticky_folder_keeps_others_files(folder: Path) -> None:
    """In a folder with the sticky bit only a file's owner removes or renames it."""
    folder.chmod(0o1777)
    run_as(folder, 'open("mine", "w").close(); result = None')
    program = 'result = [attempt(os.unlink, "mine"), attempt(os.rename, "mine", "x")]'
    assert run_as(folder, program, uid=1234, gid=1234) == ["EPERM", "EPERM"]


@pytest.mark.parametrize(
    "change",
    ['open("file", "ab").write(b"x")', 'os.truncate("file", 0)', 'open("file", "wb").close()'],
)
def test_writing_takes_set_ids_away(folder: Path, change: str) -> None:
    """Whoever writes to a program that runs as its owner ends that, in each way of writing."""
    program = f"""
open("file", "wb").write(b"program")
os.chmod("file", 0o6777)
before = owned("file")[2]
{change}
result = [before, owned("file")[2]]
"""
    assert run_as(folder, program) == ["0o6777", "0o777"]


def test_only_who_may_sets_an_images_time(mounted: Mount, glance: ServedGlance) -> None:
    """utime on an image, as on any file: EACCES or EPERM for others than its owner, who may."""
    if os.geteuid() != 0:
        pytest.skip("requires: root, to act as others")
    image = glance.add(1000)
    before = mounted.path_of(image).stat().st_mtime_ns
    name = repr(image.base_name)
    program = f"result = [attempt(os.utime, {name}), attempt(os.utime, {name}, (1, 1))]"
    assert run_as(mounted.path, program) == ["EACCES", "EPERM"]
    assert mounted.path_of(image).stat().st_mtime_ns == before
    owner = mounted.path_of(image).stat()
    assert run_as(mounted.path, program, uid=owner.st_uid, gid=owner.st_gid) == [None, None]
    assert mounted.path_of(image).stat().st_mtime_ns == 10**9


def test_images_are_owned_as_configured(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """Images show the owner of the folder beneath and 0644, or what the configuration says."""
    image = glance.add(1000)
    default = make_mount(glance, "default", start=False)
    os.chown(default.path, 1234, 5678)
    default.start()
    found = default.path_of(image).stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 5678, 0o644)
    configured = make_mount(glance, "configured", image_owner="12:34", image_mode="0440")
    found = configured.path_of(image).stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (12, 34, 0o440)


def test_owner_nobody_knows_is_refused(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """A user that does not exist ends the start with the key's name."""
    mount = make_mount(glance, start=False, image_owner="no-such-user")
    mount.launch()
    assert mount.wait_ended() == 2
    assert "config key 'image_owner': no user 'no-such-user'" in mount.log()
