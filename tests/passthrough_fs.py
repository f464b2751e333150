"""A pass-through file system that records what is written to it and fails, delays or hangs on request.

    python tests/passthrough_fs.py LOWER MOUNT CONTROL [--record FILE]

shows the folder LOWER at MOUNT, prints "ready" and serves until it is unmounted; `faulty_disk.FaultyDisk` runs it.
It can carry the cache folder: SQLite's locks are the kernel's, its -shm file can be mapped, and every other file
is read and written past the page cache, so that each read and write comes here and can be struck.  There is no
fallocate: holes are written as zeros.  Requests below are answered without being passed on to LOWER's disk where
they only ask for durability (fsync), which is recorded and can be struck like any other.

CONTROL is a Unix socket.  A connection sends one JSON object in a line and gets one back:

    {"do": "strike", "ops": ["read"], "path": "chunks/*", "error": 5, "hang": false, "delay_s": 0, "count": null}
        From now on these operations (OPS; all if empty) on paths that match (fnmatch over the path below LOWER, where
        * takes slashes too) wait `delay_s`, and wait until "heal" if `hang`, and then fail with `error` unless it
        is 0.  `count`: so many times, null for ever.  The first strike that matches counts.
    {"do": "heal"}              forget all strikes; what hangs goes on, and fails if it was told to
    {"do": "mark", "text": …}   write a mark into the record
    {"do": "status"}            {"hanging": requests that hang now, "struck": requests struck since the start}

FILE becomes a row of pickled tuples, in the order in which the operations were done.  A node is a file or folder,
by a number never used twice; LOWER itself is node 1 and must be empty at the start for a record to be complete:

    ("create", parent, name, node)  ("mkdir", parent, name, node)  ("link", parent, name, node)
    ("unlink", parent, name, node)  ("rmdir", parent, name, node)
    ("rename", parent, name, new_parent, new_name, node)
    ("write", node, start, data)    ("truncate", node, size_bytes)
    ("fsync", node)                 ("fsyncdir", node)              ("mark", text)
"""

from __future__ import annotations

import argparse
import errno
import functools
import json
import os
import pickle
import stat
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyfuse3
import trio
from disk_strikes import Strikes

# A file whose mappings must work; mapped files cannot be read past the page cache.
MAPPED_SUFFIX = "-shm"
# Requests that hang or wait must not keep others from being taken.
TASKS_MAX = 1000

Handler = Callable[..., Coroutine[Any, Any, Any]]


@dataclass(slots=True)
class Node:
    """A file or folder the kernel knows, by a descriptor that survives renames (O_PATH)."""

    number: int
    fd: int
    lookups: int = 0


def _handler(function: Handler) -> Handler:
    """Let nothing but FUSEError out: pyfuse3 would end the mount."""

    @functools.wraps(function)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return await function(*args, **kwargs)
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        except pyfuse3.FUSEError:
            raise
        except Exception:
            traceback.print_exc()
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapped


class PassThrough(pyfuse3.Operations):
    """LOWER as it is, with strikes and a record."""

    def __init__(self, lower: Path, record: BinaryIO | None) -> None:
        super().__init__()
        self._lower = os.path.realpath(lower)
        self._record = record
        root = Node(pyfuse3.ROOT_INODE, os.open(lower, os.O_PATH | os.O_DIRECTORY), 1)
        self._nodes = {root.number: root}
        self._by_identity = {_identity(os.fstat(root.fd)): root}
        self._next_number = root.number + 1
        self._node_of_handle: dict[int, int] = {}
        self.strikes = Strikes()

    # ── strikes and record ──

    def note(self, *record: object) -> None:
        """Append to the record."""
        if self._record is not None:
            pickle.dump(record, self._record)
            self._record.flush()

    async def _befall(self, op: str, node: int, name: bytes = b"") -> None:
        """Let what is to befall an operation befall it."""
        if self.strikes.any:
            await self.strikes.befall(op, self._path(node, name))

    def _path(self, node: int, name: bytes) -> str:
        path = os.readlink(f"/proc/self/fd/{self._nodes[node].fd}").removesuffix(" (deleted)")
        return os.path.relpath(os.path.join(path, os.fsdecode(name)) if name else path, self._lower)

    # ── nodes ──

    def _looked_up(self, parent: int, name: bytes) -> pyfuse3.EntryAttributes:
        fd = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=self._nodes[parent].fd)
        found = os.fstat(fd)
        node = self._by_identity.get(_identity(found))
        if node is None:
            node = Node(self._next_number, fd)
            self._next_number += 1
            self._nodes[node.number] = self._by_identity[_identity(found)] = node
        else:
            os.close(fd)
        node.lookups += 1
        return _attributes(node.number, found)

    def _number_of(self, parent: int, name: bytes) -> int:
        """Return the node of a name; 0 if the kernel never looked it up."""
        found = os.stat(name, dir_fd=self._nodes[parent].fd, follow_symlinks=False)
        node = self._by_identity.get(_identity(found))
        return node.number if node else 0

    def _open(self, number: int, flags: int) -> int:
        flags &= ~(os.O_APPEND | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL | os.O_DIRECT)
        return os.open(f"/proc/self/fd/{self._nodes[number].fd}", flags | os.O_CLOEXEC)

    def _opened(self, number: int, fd: int) -> pyfuse3.FileInfo:
        self._node_of_handle[fd] = number
        is_mapped = self._path(number, b"").endswith(MAPPED_SUFFIX)
        return pyfuse3.FileInfo(fh=fd, direct_io=not is_mapped)

    @_handler
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for number, count in inode_list:
            node = self._nodes[number]
            node.lookups -= count
            if not node.lookups:
                del self._nodes[number], self._by_identity[_identity(os.fstat(node.fd))]
                os.close(node.fd)

    # ── looking ──

    @_handler
    async def lookup(self, parent_inode: int, name: bytes, ctx: object) -> pyfuse3.EntryAttributes:
        await self._befall("lookup", parent_inode, name)
        return self._looked_up(parent_inode, name)

    @_handler
    async def getattr(self, inode: int, ctx: object = None) -> pyfuse3.EntryAttributes:
        await self._befall("getattr", inode)
        return _attributes(inode, os.fstat(self._nodes[inode].fd))

    @_handler
    async def statfs(self, ctx: object) -> pyfuse3.StatvfsData:
        await self._befall("statfs", pyfuse3.ROOT_INODE)
        found, data = os.statvfs(self._lower), pyfuse3.StatvfsData()
        for name in ("bsize", "frsize", "blocks", "bfree", "bavail", "files", "ffree", "favail"):
            setattr(data, f"f_{name}", getattr(found, f"f_{name}"))
        data.f_namemax = found.f_namemax
        return data

    @_handler
    async def opendir(self, inode: int, ctx: object) -> int:
        await self._befall("opendir", inode)
        return inode

    @_handler
    async def readdir(self, fh: int, start_id: int, token: object) -> None:
        await self._befall("readdir", fh)
        fd = self._open(fh, os.O_RDONLY | os.O_DIRECTORY)
        try:
            names = sorted(map(os.fsencode, os.listdir(fd)))
        finally:
            os.close(fd)
        for at, name in enumerate(names[start_id:], start_id + 1):
            try:
                attributes = self._looked_up(fh, name)
            except FileNotFoundError:
                continue
            if not pyfuse3.readdir_reply(token, name, attributes, at):
                self._nodes[attributes.st_ino].lookups -= 1
                return

    @_handler
    async def open(self, inode: int, flags: int, ctx: object) -> pyfuse3.FileInfo:
        await self._befall("open", inode)
        return self._opened(inode, self._open(inode, flags))

    @_handler
    async def read(self, fh: int, off: int, size: int) -> bytes:
        await self._befall("read", self._node_of_handle[fh])
        return os.pread(fh, size, off)

    @_handler
    async def release(self, fh: int) -> None:
        del self._node_of_handle[fh]
        os.close(fh)

    # ── changing ──

    @_handler
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: object
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        await self._befall("create", parent_inode, name)
        flags = flags & ~(os.O_APPEND | os.O_DIRECT) | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(name, flags, mode, dir_fd=self._nodes[parent_inode].fd)
        attributes = self._looked_up(parent_inode, name)
        self.note("create", parent_inode, os.fsdecode(name), attributes.st_ino)
        return self._opened(attributes.st_ino, fd), attributes

    @_handler
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: object) -> pyfuse3.EntryAttributes:
        await self._befall("mkdir", parent_inode, name)
        os.mkdir(name, mode, dir_fd=self._nodes[parent_inode].fd)
        attributes = self._looked_up(parent_inode, name)
        self.note("mkdir", parent_inode, os.fsdecode(name), attributes.st_ino)
        return attributes

    @_handler
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: object
    ) -> pyfuse3.EntryAttributes:
        await self._befall("link", new_parent_inode, new_name)
        # What an O_PATH descriptor names is linked by its name in /proc (open(2), O_PATH).
        source = f"/proc/self/fd/{self._nodes[inode].fd}"
        os.link(source, new_name, dst_dir_fd=self._nodes[new_parent_inode].fd, follow_symlinks=True)
        self.note("link", new_parent_inode, os.fsdecode(new_name), inode)
        return self._looked_up(new_parent_inode, new_name)

    @_handler
    async def unlink(self, parent_inode: int, name: bytes, ctx: object) -> None:
        await self._befall("unlink", parent_inode, name)
        number = self._number_of(parent_inode, name)
        os.unlink(name, dir_fd=self._nodes[parent_inode].fd)
        self.note("unlink", parent_inode, os.fsdecode(name), number)

    @_handler
    async def rmdir(self, parent_inode: int, name: bytes, ctx: object) -> None:
        await self._befall("rmdir", parent_inode, name)
        number = self._number_of(parent_inode, name)
        os.rmdir(name, dir_fd=self._nodes[parent_inode].fd)
        self.note("rmdir", parent_inode, os.fsdecode(name), number)

    @_handler
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: object,
    ) -> None:
        await self._befall("rename", parent_inode_old, name_old)
        if flags:
            raise pyfuse3.FUSEError(errno.EINVAL)
        number = self._number_of(parent_inode_old, name_old)
        old_fd, new_fd = self._nodes[parent_inode_old].fd, self._nodes[parent_inode_new].fd
        os.rename(name_old, name_new, src_dir_fd=old_fd, dst_dir_fd=new_fd)
        names = os.fsdecode(name_old), os.fsdecode(name_new)
        self.note("rename", parent_inode_old, names[0], parent_inode_new, names[1], number)

    @_handler
    async def setattr(
        self, inode: int, attr: Any, fields: Any, fh: int | None, ctx: object
    ) -> pyfuse3.EntryAttributes:
        await self._befall("truncate" if fields.update_size else "setattr", inode)
        path = f"/proc/self/fd/{self._nodes[inode].fd}"
        if fields.update_size:
            os.truncate(path if fh is None else fh, attr.st_size)
            self.note("truncate", inode, attr.st_size)
        if fields.update_mode:
            os.chmod(path, stat.S_IMODE(attr.st_mode))
        if fields.update_uid or fields.update_gid:
            os.chown(path, attr.st_uid if fields.update_uid else -1, attr.st_gid if fields.update_gid else -1)
        if fields.update_atime or fields.update_mtime:
            now = os.stat(path)
            atime_ns = attr.st_atime_ns if fields.update_atime else now.st_atime_ns
            os.utime(path, ns=(atime_ns, attr.st_mtime_ns if fields.update_mtime else now.st_mtime_ns))
        return _attributes(inode, os.fstat(self._nodes[inode].fd))

    @_handler
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        number = self._node_of_handle[fh]
        await self._befall("write", number)
        count = os.pwrite(fh, buf, off)
        self.note("write", number, off, bytes(buf[:count]))
        return count

    # ── durability ──

    @_handler
    async def fsync(self, fh: int, datasync: bool) -> None:
        number = self._node_of_handle[fh]
        await self._befall("fsync", number)
        self.note("fsync", number)

    @_handler
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._befall("fsyncdir", fh)
        self.note("fsyncdir", fh)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _attributes(number: int, found: os.stat_result) -> pyfuse3.EntryAttributes:
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = number
    for name in ("mode", "nlink", "uid", "gid", "rdev", "size", "atime_ns", "mtime_ns", "ctime_ns", "blocks"):
        setattr(attributes, f"st_{name}", getattr(found, f"st_{name}"))
    attributes.st_blksize = 4096
    # Tests change LOWER beneath the mount.
    attributes.attr_timeout = attributes.entry_timeout = 0
    return attributes


async def _answer(operations: PassThrough, stream: trio.SocketStream) -> None:
    """Answer one request on the control socket."""
    text = b""
    while not text.endswith(b"\n"):
        more = await stream.receive_some()
        if not more:
            return
        text += more
    request, reply = json.loads(text), {}
    match request["do"]:
        case "strike":
            operations.strikes.begin(request)
        case "heal":
            operations.strikes.heal()
        case "mark":
            operations.note("mark", request["text"])
        case "status":
            reply = {"hanging": operations.strikes.hanging, "struck": operations.strikes.struck}
        case other:
            reply = {"error": f"{other!r} is no request"}
    await stream.send_all(json.dumps(reply).encode() + b"\n")


async def _serve(operations: PassThrough, control: Path) -> None:
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(control))
        listener.listen()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_serve_control, operations, listener)
            print("ready", flush=True)
            await pyfuse3.main(max_tasks=TASKS_MAX)
            nursery.cancel_scope.cancel()


async def _serve_control(operations: PassThrough, listener: trio.socket.SocketType) -> None:
    while True:
        connection, _ = await listener.accept()
        async with trio.SocketStream(connection) as stream:
            await _answer(operations, stream)


def _options() -> Iterator[str]:
    yield from pyfuse3.default_options
    yield "fsname=passthrough"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("lower", "mount", "control"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--record", type=Path)
    given = parser.parse_args()
    record = given.record.open("wb") if given.record else None
    operations = PassThrough(given.lower, record)
    pyfuse3.init(operations, str(given.mount), set(_options()))
    try:
        trio.run(_serve, operations, given.control)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    sys.exit(main())
