"""FUSE requests in, images' and the upper folder's answers out.

Each handler is wrapped so that it raises nothing that would end the mount (I6).  Every handle is its inode number and
every inode number a function of durable state, so that the next daemon understands the kernel's memory of this one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import pyfuse3
import trio

from lazyimg.daemon.attributes import statistics_data, upper_attributes
from lazyimg.daemon.handles import Handles
from lazyimg.daemon.inflight import InFlight
from lazyimg.daemon.kernelpages import is_known
from lazyimg.daemon.lazyfiles import LazyFiles
from lazyimg.daemon.lostopens import LostOpens
from lazyimg.daemon.neverraises import never_raises
from lazyimg.daemon.upper import INODE_BIT, ROOT_INODE, Caller, Change, Upper
from lazyimg.daemon.uppertrouble import UpperTrouble
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)
T = TypeVar("T")

# Names of a listing looked up in one go; the kernel's buffer of 4 KiB holds about this many.
LISTED_TOGETHER = 24


class Filesystem(pyfuse3.Operations):
    """The mount: lazy images, and all else from the upper folder, whose names go before theirs (I10)."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        lazy: LazyFiles,
        upper: Upper,
        upper_limiter: trio.CapacityLimiter,
        take_over: Callable[[], None],
        after_answers: trio.Nursery,
        handles: Handles,
    ) -> None:
        super().__init__()
        self._lazy = lazy
        self._images = lazy.images
        self._upper = upper
        self._upper_limiter = upper_limiter
        self._upper_trouble = UpperTrouble()
        self._take_over = take_over
        self.in_flight = InFlight(lazy.images)
        self._after_answers = after_answers
        self.lost_opens = LostOpens(handles, is_known, self._closed)

    def init(self) -> None:
        self._take_over()

    # ── reads: the hot path ──

    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        # pyfuse3 takes any buffer, and replies before anything else runs.
        # Not wrapped for its first half: 2 µs of the 40 that a present read takes.
        image = self._images.get(fh)
        if image is not None:
            try:
                data = image.read_nowait(off, size)
            except Exception:
                self.in_flight.unforeseen_errors += 1
                logger.exception("read_nowait failed in an unforeseen way; reading in a thread")
                data = None
            if data is not None:
                return data
        return await self._read_slow(fh, off, size)

    @never_raises
    async def _read_slow(self, inode: int, start: int, size_bytes: int) -> bytes:
        read = self.in_flight.begin_read(inode, start, size_bytes)
        try:
            if inode & INODE_BIT:
                return await self._in_upper(self._upper.files.read, inode, start, size_bytes)
            image = await self._lazy.image(inode)
            return await image.read(start, size_bytes)
        finally:
            self.in_flight.end_read(read)

    # ── looking ──

    @never_raises
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        found = await self._in_upper(self._upper.lookup, parent_inode, name)
        if found is not None:
            return upper_attributes(found)
        attributes = await self._lazy.lookup(name) if parent_inode == ROOT_INODE else None
        if attributes is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return attributes

    @never_raises
    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, _ in inode_list:
            if self.lost_opens.may_have(inode):
                self._after_answers.start_soon(self.lost_opens.look_into, inode)
        forgotten = [(inode, count) for inode, count in inode_list if inode & INODE_BIT]
        if forgotten:
            await self._in_upper(self._upper.forget, forgotten)

    @never_raises
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        if _is_upper(inode):
            return upper_attributes(await self._in_upper(self._upper.attributes, inode))
        return await self._lazy.attributes(inode)

    @never_raises
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        if inode & INODE_BIT:
            return await self._in_upper(self._upper.target, inode)
        return self._lazy.target(inode)

    @never_raises
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    @never_raises
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        names = await self._in_upper(self._upper.names, fh)
        lazy = self._lazy.listed() if fh == ROOT_INODE else {}
        # In the order of a hash of the name, which is also the cookie: a listing goes on where it stopped,
        # whatever changed meanwhile and whichever daemon began it.
        listing = sorted((_cookie(name), name) for name in {*names, *lazy})
        left = (one for one in listing if one[0] > start_id)
        while block := list(itertools.islice(left, LISTED_TOGETHER)):
            if not await self._list_block(fh, block, lazy, token):
                break

    async def _list_block(
        self,
        folder: int,
        block: list[tuple[int, bytes]],
        lazy: dict[bytes, ImageEntry],
        token: pyfuse3.ReaddirToken,
    ) -> bool:
        """Add names with their attributes to a listing; False when it is full.  What is gone meanwhile is left out."""
        found = await self._in_upper(self._upper.lookup_all, folder, [name for _, name in block])
        is_full = False
        # The kernel counts a lookup of each name it is given; the others are taken back.
        not_given = []
        for (cookie, name), real in zip(block, found, strict=True):
            if not is_full and real is not None:
                is_full = not pyfuse3.readdir_reply(token, name, upper_attributes(real), cookie)
            elif not is_full and name in lazy:
                attributes = self._lazy.listed_attributes(lazy[name])
                is_full = not pyfuse3.readdir_reply(token, name, attributes, cookie)
            if is_full and real is not None:
                not_given.append((real.inode, 1))
        if not_given:
            await self._in_upper(self._upper.forget, not_given)
        return not is_full

    @never_raises
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return statistics_data(await self._in_upper(self._upper.statistics))

    # ── open files ──

    @never_raises
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if inode & INODE_BIT:
            is_direct = await self._in_upper(
                functools.partial(self._upper.files.open, by_root=ctx.uid == 0), inode, flags
            )
            return pyfuse3.FileInfo(fh=inode, keep_cache=False, direct_io=is_direct)
        await self._lazy.open(inode, flags)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @never_raises
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        # Only files of the upper folder can be opened for writing.
        return await self._in_upper(self._upper.files.write, fh, off, buf)

    @never_raises
    async def flush(self, fh: int) -> None:
        if fh & INODE_BIT and self._upper.files.is_written(fh):
            await self._in_upper(self._upper.files.flush, fh)

    @never_raises
    async def fsync(self, fh: int, datasync: bool) -> None:
        if fh & INODE_BIT:
            await self._in_upper(functools.partial(self._upper.files.sync, fh, data_only=datasync))

    @never_raises
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await self._in_upper(functools.partial(self._upper.sync_folder, fh, data_only=datasync))

    async def release(self, fh: int) -> None:
        # pyfuse3 answers before this task runs.  A release that the kernel sends again, because nobody answered
        # it, is then never counted twice: the file would be closed under another of its handles.
        self.lost_opens.release_begins(fh)
        self._after_answers.start_soon(self._release, fh)

    async def _release(self, inode: int) -> None:
        try:
            with contextlib.suppress(pyfuse3.FUSEError):
                await self._closed(inode, 1)
        finally:
            self.lost_opens.release_ended(inode)

    @never_raises
    async def _closed(self, inode: int, count: int) -> None:
        if inode & INODE_BIT:
            await self._in_upper(self._upper.files.release, inode, count)
        else:
            await self._lazy.release(inode, count)

    # ── making names ──

    @never_raises
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        if flags & os.O_EXCL:
            self._refuse_shown(parent_inode, name)
        found, is_direct = await self._in_upper(
            self._upper.create, parent_inode, name, mode, flags, _caller(ctx)
        )
        opened = pyfuse3.FileInfo(fh=found.inode, keep_cache=False, direct_io=is_direct)
        return opened, upper_attributes(found)

    @never_raises
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._refuse_shown(parent_inode, name)
        return upper_attributes(
            await self._in_upper(self._upper.make_node, parent_inode, name, mode, _caller(ctx))
        )

    @never_raises
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._refuse_shown(parent_inode, name)
        return upper_attributes(
            await self._in_upper(self._upper.make_folder, parent_inode, name, mode, _caller(ctx))
        )

    @never_raises
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._refuse_shown(parent_inode, name)
        return upper_attributes(
            await self._in_upper(self._upper.make_symlink, parent_inode, name, target, _caller(ctx))
        )

    @never_raises
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if not inode & INODE_BIT:
            raise pyfuse3.FUSEError(errno.EPERM)
        self._refuse_shown(new_parent_inode, new_name)
        return upper_attributes(
            await self._in_upper(self._upper.make_link, inode, new_parent_inode, new_name)
        )

    # ── changing ──

    @never_raises
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        change = Change(
            mode=attr.st_mode if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size_bytes=attr.st_size if fields.update_size else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
        )
        if _is_upper(inode):
            return upper_attributes(await self._in_upper(self._upper.change, inode, change))
        return await self._lazy.change(inode, change)

    @never_raises
    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        try:
            await self._in_upper(self._upper.remove, parent_inode, name)
        except FileNotFoundError:
            if parent_inode != ROOT_INODE:
                raise
            await self._lazy.hide(name)

    @never_raises
    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        await self._in_upper(self._upper.remove_folder, parent_inode, name)

    @never_raises
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        is_onto_lazy = self._is_shown(parent_inode_new, name_new)
        if flags & pyfuse3.RENAME_NOREPLACE and is_onto_lazy:
            raise pyfuse3.FUSEError(errno.EEXIST)
        try:
            await self._in_upper(
                self._upper.rename, parent_inode_old, name_old, parent_inode_new, name_new, flags
            )
        except FileNotFoundError:
            # An image keeps its name; EXDEV would let mv(1) copy it whole and unlink it.
            if self._is_shown(parent_inode_old, name_old) or is_onto_lazy:
                raise pyfuse3.FUSEError(errno.EPERM) from None
            raise
        if is_onto_lazy:
            await self._lazy.replaced(name_new)

    # ── what handlers share ──

    def _is_shown(self, parent: int, name: bytes) -> bool:
        return parent == ROOT_INODE and self._lazy.is_shown(name)

    def _refuse_shown(self, parent: int, name: bytes) -> None:
        """Refuse to make what came to be shown since the kernel looked for it."""
        if self._is_shown(parent, name):
            raise pyfuse3.FUSEError(errno.EEXIST)

    async def _in_upper(self, function: Callable[..., T], *args: object) -> T:
        try:
            return await trio.to_thread.run_sync(function, *args, limiter=self._upper_limiter)
        except OSError as exc:
            called = function.func if isinstance(function, functools.partial) else function
            self._upper_trouble.note(called.__name__, exc)
            raise


def _is_upper(inode: int) -> bool:
    return inode & INODE_BIT != 0 or inode == ROOT_INODE


def _caller(ctx: pyfuse3.RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid)


def _cookie(name: bytes) -> int:
    """Return a name's place in a listing: from 1 up to 2**62, since the kernel's offsets are signed."""
    return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 2) + 1
