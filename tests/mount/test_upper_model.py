"""Whatever is done to files in the mount comes out as it does in a plain folder of the same file system."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_mount import Mount

from lazyimg.daemon import linux

pytestmark = pytest.mark.slow

NAMES = ["a", "b", "c", "d", "d/e", "d/f", "g/h"]
OPERATIONS_COUNT = 600
# Reported another way by FUSE, or decided by the kernel before the file system is asked.
SAME_ERRNO = {errno.ENOTEMPTY: errno.EEXIST}


class Twin:
    """One folder that the operations are done to, and the files that stay open in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[int, int] = {}

    def close(self) -> None:
        for fd in self._open.values():
            os.close(fd)

    def close_unlinked(self) -> None:
        """Close what has no name any more: a daemon killed now could not hand it to the next."""
        for slot, fd in list(self._open.items()):
            if os.fstat(fd).st_nlink == 0:
                os.close(self._open.pop(slot))

    def do(self, operation: str, dice: random.Random) -> object:
        """Do one operation with names and numbers of `dice`; return its result or its errno."""
        try:
            return getattr(self, f"do_{operation}")(dice)
        except OSError as exc:
            return f"errno {SAME_ERRNO.get(exc.errno or 0, exc.errno)}"

    def _name(self, dice: random.Random) -> Path:
        return self.path / dice.choice(NAMES)

    def do_write(self, dice: random.Random) -> object:
        flags = dice.choice((0, os.O_APPEND, os.O_TRUNC, os.O_EXCL)) | os.O_CREAT | os.O_NONBLOCK
        fd = os.open(self._name(dice), flags | dice.choice((os.O_WRONLY, os.O_RDWR)), dice.randrange(0o1000))
        with contextlib.closing(os.fdopen(fd, "wb", buffering=0)) as file:
            data = dice.randbytes(dice.choice((0, 1, 4095, 4096, 70_000, 300_000)))
            at = dice.randrange(200_000)
            return (os.pwrite if dice.random() < 0.5 else _write_at)(file.fileno(), data, at)

    def do_open(self, dice: random.Random) -> object:
        slot = dice.randrange(4)
        name = self._name(dice)
        if slot in self._open:
            os.close(self._open.pop(slot))
        flags = os.O_CREAT | os.O_NONBLOCK | dice.choice((os.O_RDWR, os.O_RDWR | os.O_APPEND))
        self._open[slot] = os.open(name, flags, 0o666)
        return True

    def do_use_open(self, dice: random.Random) -> object:
        fd = self._open.get(dice.randrange(4), -1)
        data = dice.randbytes(dice.choice((10, 5000)))
        return [
            os.write(fd, data),
            os.pread(fd, 100_000, dice.randrange(10_000)),
            os.fstat(fd).st_size,
            os.fstat(fd).st_nlink,
            os.lseek(fd, 0, os.SEEK_CUR),
        ]

    def do_truncate_open(self, dice: random.Random) -> object:
        fd = self._open.get(dice.randrange(4), -1)
        os.ftruncate(fd, dice.randrange(100_000))
        return [os.fsync(fd), os.fdatasync(fd)]

    def do_read(self, dice: random.Random) -> object:
        # A named pipe must not hold the test up.
        fd = os.open(self._name(dice), os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(fd, "rb", buffering=0) as file:
            return file.read(1 << 20)

    def do_truncate(self, dice: random.Random) -> object:
        return os.truncate(self._name(dice), dice.randrange(400_000))

    def do_mkdir(self, dice: random.Random) -> object:
        return os.mkdir(self._name(dice), dice.randrange(0o2000))

    def do_rmdir(self, dice: random.Random) -> object:
        return os.rmdir(self._name(dice))

    def do_unlink(self, dice: random.Random) -> object:
        return os.unlink(self._name(dice))

    def do_rename(self, dice: random.Random) -> object:
        flags = dice.choice((0, 0, 0, linux.RENAME_NOREPLACE, linux.RENAME_EXCHANGE, 3))
        return linux.rename(-1, os.fsencode(self._name(dice)), -1, os.fsencode(self._name(dice)), flags)

    def do_link(self, dice: random.Random) -> object:
        return os.link(self._name(dice), self._name(dice), follow_symlinks=False)

    def do_symlink(self, dice: random.Random) -> object:
        return os.symlink(dice.choice(("a", "d", "nowhere", "x" * 300)), self._name(dice))

    def do_mkfifo(self, dice: random.Random) -> object:
        return os.mkfifo(self._name(dice), dice.randrange(0o1000))

    def do_chmod(self, dice: random.Random) -> object:
        return os.chmod(self._name(dice), dice.randrange(0o10000))

    def do_chown(self, dice: random.Random) -> object:
        ids = dice.choice((-1, 12)), dice.choice((-1, 34))
        return os.chown(self._name(dice), *ids, follow_symlinks=False)

    def do_utime(self, dice: random.Random) -> object:
        times = dice.randrange(10**18), dice.randrange(10**18)
        os.utime(self._name(dice), ns=times, follow_symlinks=False)
        found = os.lstat(self._name(dice))
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def do_one_time(self, dice: random.Random) -> object:
        name = self._name(dice)
        linux.set_times(str(name), dice.randrange(10**18), None)
        return os.stat(name).st_atime_ns

    def do_list(self, dice: random.Random) -> object:
        return sorted(os.listdir(self._name(dice)))

    def do_sync_folder(self, dice: random.Random) -> object:
        fd = os.open(self._name(dice), os.O_RDONLY | os.O_DIRECTORY)
        try:
            return os.fsync(fd)
        finally:
            os.close(fd)


def _write_at(fd: int, data: bytes, at: int) -> int:
    os.lseek(fd, at, os.SEEK_SET)
    return os.write(fd, data)


def tree(root: Path) -> dict[str, Any]:
    """Return all there is below a folder: kind, mode, owner, links and content."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = Path(folder, name)
            attributes = path.lstat()
            content: object = None
            if path.is_symlink():
                content = os.readlink(path)
            elif stat.S_ISREG(attributes.st_mode):
                content = path.read_bytes()
            found[str(path.relative_to(root))] = (
                oct(attributes.st_mode),
                attributes.st_uid,
                attributes.st_gid,
                None if stat.S_ISDIR(attributes.st_mode) else attributes.st_nlink,
                content,
            )
    return found


OPERATIONS = sorted(name.removeprefix("do_") for name in dir(Twin) if name.startswith("do_"))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_killed", [False, True])
def test_mount_does_what_a_plain_folder_does(
    make_mount: Callable[..., Mount], tmp_path: Path, seed: int, is_killed: bool
) -> None:
    """[I9] Of 600 operations each has the same result in both folders, killed daemons in between or not."""
    mount = make_mount("http://127.0.0.1:9", f"m{seed}")
    plain = tmp_path / "plain"
    in_mount = mount.path / "twin"
    for folder in (plain, in_mount):
        folder.mkdir()
        (folder / "d").mkdir()
    twins = Twin(plain), Twin(in_mount)
    dice = random.Random(seed)
    try:
        for number in range(OPERATIONS_COUNT):
            operation, chance = dice.choice(OPERATIONS), dice.random()
            if is_killed and number % 150 == 149:
                for twin in twins:
                    twin.close_unlinked()
                mount.kill_daemon()
            results = [twin.do(operation, random.Random(chance)) for twin in twins]
            assert results[1] == results[0], (number, operation)
        assert sorted(tree(in_mount).items()) == sorted(tree(plain).items())
    finally:
        for twin in twins:
            twin.close()
