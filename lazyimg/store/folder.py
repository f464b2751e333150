"""A folder that is ours alone, held by a descriptor: what lies in it is reached by that, never by its path again.

A path can be made to lead elsewhere by whoever may rename one of its components; a descriptor cannot.  A file is
opened only if nobody else can change it: regular, our user's, without a second name, and no symbolic link.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from pathlib import Path

from lazyimg.errors import CacheUnusable

_PART = ".part"


class PrivateFolder:
    """An open folder.  Methods are for threads and raise OSError.

    path: for messages, and for what can only be given a path.
    """

    def __init__(self, path: Path, fd: int) -> None:
        """Own `fd` from now on."""
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> PrivateFolder:
        """Open a folder by its path, made durably if it is not there.

        Raises CacheUnusable for one that others could change.
        """
        missing = [one for one in (path, *path.parents) if not one.exists()]
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for one in missing:
            _sync(one.parent)
        if path.is_symlink():
            raise CacheUnusable(f"cache folder {path} is a symbolic link; give the folder itself")
        for parent in path.absolute().parents:
            mode = parent.stat().st_mode
            # SQLite opens its files by their paths, as threads need them: another folder put here would be believed.
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise CacheUnusable(
                    f"cache folder {path}: anybody may swap it in {parent}; run: chmod o-w {parent}"
                )
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        return cls._checked(path, fd)

    def folder(self, name: str) -> PrivateFolder:
        """Open a folder in this one, made if it is not there; durable after `sync`."""
        try:
            os.mkdir(name, 0o700, dir_fd=self.fd)
        except FileExistsError:
            if not stat.S_ISDIR(self.stat(name).st_mode):
                raise CacheUnusable(
                    f"cache folder {self.path}: {name} is not a folder; remove it or give another cache folder"
                ) from None
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        return self._checked(self.path / name, os.open(name, flags, dir_fd=self.fd))

    @classmethod
    def _checked(cls, path: Path, fd: int) -> PrivateFolder:
        found = os.fstat(fd)
        problem = ""
        if found.st_uid != os.geteuid():
            problem = f"belongs to user {found.st_uid}, not {os.geteuid()}; chown it or give another"
        elif found.st_mode & 0o022:
            problem = f"can be written by others; run: chmod go-w {path}"
        if problem:
            os.close(fd)
            raise CacheUnusable(f"cache folder {path} {problem}")
        return cls(path, fd)

    def close(self) -> None:
        os.close(self.fd)

    def names(self) -> list[str]:
        """Return the names in the folder."""
        return os.listdir(self.fd)

    def stat(self, name: str) -> os.stat_result:
        """Return what a name itself stands for, link or not."""
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def problem_of(self, name: str) -> str:
        """Return why the file of a name cannot be trusted, or ""."""
        try:
            return _problem_of(self.stat(name))
        except FileNotFoundError:
            return "it is missing"

    def open_file(self, name: str, flags: int) -> int:
        """Open a file; a new one is nobody else's to read.  Raises PermissionError if it is not ours alone."""
        # O_NONBLOCK: a pipe in its place must not hang us.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        problem = _problem_of(os.fstat(fd))
        if problem:
            os.close(fd)
            raise PermissionError(errno.EPERM, f"{self.path / name}: {problem}")
        return fd

    def read(self, name: str, size_max_bytes: int) -> bytes | None:
        """Return a small file's content, None if there is none.  Longer ones are not read: OSError."""
        try:
            fd = self.open_file(name, os.O_RDONLY)
        except FileNotFoundError:
            return None
        with os.fdopen(fd, "rb") as file:
            content = file.read(size_max_bytes + 1)
        if len(content) > size_max_bytes:
            raise OSError(errno.EFBIG, f"{self.path / name}: longer than {size_max_bytes} bytes")
        return content

    def replace(self, name: str, content: bytes, *, is_durable: bool) -> None:
        """Give a file another content, as one: after a crash or power loss it is the one or the other.

        is_durable: from this call's return it is the new one.
        """
        part = name + _PART
        self.remove(part)
        # A name that power loss leaves with neither content would lose what was there.
        must_sync = is_durable or not self.problem_of(name)
        fd = self.open_file(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        with os.fdopen(fd, "wb", buffering=0) as file:
            file.write(content)
            if must_sync:
                os.fsync(fd)
        os.rename(part, name, src_dir_fd=self.fd, dst_dir_fd=self.fd)
        if is_durable:
            self.sync()

    def remove(self, name: str) -> None:
        """Remove a file, a link or a whole folder, if it is there."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            return
        except IsADirectoryError:
            shutil.rmtree(name, dir_fd=self.fd)

    def allocated_bytes(self, name: str) -> int:
        """Return the bytes a file or a whole folder takes on disk."""
        path = self.path / name
        parts = [path, *path.rglob("*")] if stat.S_ISDIR(self.stat(name).st_mode) else [path]
        return sum(part.lstat().st_blocks * 512 for part in parts)

    def move(self, name: str, target: PrivateFolder) -> str:
        """Move a name to another folder, under a name not used there; return that.  Raises FileNotFoundError."""
        new_name = f"{name}.{secrets.token_hex(4)}"
        os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=target.fd)
        return new_name

    def sync(self) -> None:
        """Make changes of names in this folder durable."""
        os.fsync(self.fd)


def _problem_of(found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}"
    if found.st_nlink != 1:
        return "it has another name, through which it may be changed"
    return ""


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
