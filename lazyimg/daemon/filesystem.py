"""FUSE requests in, images' and the upper folder's answers out.  The one place with errno numbers.

pyfuse3 ends the mount, for every guest, when a handler raises anything but FUSEError (I6): each handler here is
wrapped so that it cannot.  Every handle is its inode number and every inode number a function of durable state,
so that the next daemon understands the kernel's memory of this one.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import trio

from lazyimg.core.identity import is_base_name, is_image_id
from lazyimg.daemon.upper import INODE_BIT, ROOT_INODE, Upper
from lazyimg.errors import (
    ChunkAbsent,
    ChunkDamaged,
    GlanceUnavailable,
    ImageForbidden,
    ImageNotFound,
    ImageRefused,
    LazyImgError,
    LookupUndecided,
    ReadTimeout,
    WholeBody,
)
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# What a handler's error becomes.  Reads: EIO, which a guest's rerror policy can pause on; a lookup: ENOENT only
# for what is known not to be shown, EAGAIN for what is not known yet, so that nobody takes it for absent.
ERRNO: dict[type[LazyImgError], int] = {
    ReadTimeout: errno.EIO,
    GlanceUnavailable: errno.EIO,
    WholeBody: errno.EIO,
    ImageNotFound: errno.EIO,
    ImageForbidden: errno.EIO,
    ImageRefused: errno.EIO,
    ChunkAbsent: errno.EIO,
    ChunkDamaged: errno.EIO,
    LookupUndecided: errno.EAGAIN,
}
# The kernel may keep a name and its attributes this long: a real file may take the name, and blocks grow.
ENTRY_TIMEOUT_S = 1
ATTR_TIMEOUT_S = 1
LAZY_MODE = stat.S_IFREG | 0o644
LINK_MODE = stat.S_IFLNK | 0o777


def _never_raises(
    handler: Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Filesystem, P], Coroutine[Any, Any, T]]:
    """Let nothing but FUSEError out of a handler."""

    @functools.wraps(handler)
    async def wrapped(self: Filesystem, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except LazyImgError as exc:
            number = ERRNO.get(type(exc), errno.EIO)
            level = logging.INFO if number == errno.EAGAIN else logging.WARNING
            logger.log(level, "%s: %s", handler.__name__, exc)
            raise pyfuse3.FUSEError(number) from None
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or errno.EIO) from None
        except Exception:
            logger.exception("%s failed in an unforeseen way; answered EIO", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from None

    return wrapped  # type: ignore[return-value]  # mypy's _Wrapped is not the callable it stands for


class Filesystem(pyfuse3.Operations):
    """The mount: lazy images from the catalog, all else from the upper folder."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(
        self,
        catalog: Catalog,
        upper: Upper,
        upper_limiter: trio.CapacityLimiter,
        take_over: Callable[[], None],
    ) -> None:
        super().__init__()
        self._catalog = catalog
        self._upper = upper
        self._upper_limiter = upper_limiter
        self._take_over = take_over
        # Images by inode number; filled when they are looked up or opened, so that a read finds its own at once.
        self._images: dict[int, LazyImage] = {}

    def init(self) -> None:
        self._take_over()

    # ── reads: the hot path ──

    async def read(self, fh: int, off: int, size: int) -> bytes | memoryview:  # type: ignore[override]
        # pyfuse3 takes any buffer, and replies before anything else runs.
        # Not wrapped for its first half: 2 µs of the 40 that a present read takes.
        image = self._images.get(fh)
        if image is not None:
            data = image.read_nowait(off, size)
            if data is not None:
                return data
        return await self._read_slow(fh, off, size)

    @_never_raises
    async def _read_slow(self, inode: int, start: int, size_bytes: int) -> bytes:
        if inode & INODE_BIT:
            return await self._in_upper(self._upper.read, inode, start, size_bytes)
        image = await self._image(inode)
        return await image.read(start, size_bytes)

    # ── names ──

    @_never_raises
    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        found = await self._in_upper(self._upper.lookup, parent_inode, name)
        if found is not None:
            return _upper_attributes(found)
        text = os.fsdecode(name)
        if parent_inode != ROOT_INODE or not (is_base_name(text) or is_image_id(text)):
            raise pyfuse3.FUSEError(errno.ENOENT)
        image = await self._catalog.lookup(text)
        if image is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        if is_image_id(text):
            return self._link_attributes(image)
        self._images[image.inode] = image
        return self._lazy_attributes(image)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for inode, count in inode_list:
            if inode & INODE_BIT:
                self._upper.forget(inode, count)

    @_never_raises
    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None = None) -> pyfuse3.EntryAttributes:
        if inode & INODE_BIT or inode == ROOT_INODE:
            return _upper_attributes(await self._in_upper(self._upper.attributes, inode), inode)
        link = self._catalog.link_target(inode)
        if link is not None:
            return _link_attributes(inode, len(link))
        return self._lazy_attributes(await self._image(inode))

    @_never_raises
    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        if inode & INODE_BIT:
            return await self._in_upper(self._upper.target, inode)
        target = self._catalog.link_target(inode)
        if target is None:
            raise pyfuse3.FUSEError(errno.ESTALE)
        return target.encode()

    @_never_raises
    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        return inode

    @_never_raises
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        names = await self._in_upper(self._upper.names, fh)
        lazy = self._catalog.names_in_use() if fh == ROOT_INODE else {}
        # In the order of a hash of the name, which is also the cookie: a listing goes on where it stopped,
        # whatever changed meanwhile and whichever daemon began it.
        everything = {*names, *map(os.fsencode, lazy)}
        for cookie, name in sorted((_cookie(name), name) for name in everything):
            if cookie <= start_id:
                continue
            attributes = await self._listed(fh, name, lazy)
            if attributes is not None and not pyfuse3.readdir_reply(token, name, attributes, cookie):
                if attributes.st_ino & INODE_BIT:
                    self._upper.forget(attributes.st_ino, 1)
                break

    async def _listed(self, folder: int, name: bytes, lazy: dict[str, str]) -> pyfuse3.EntryAttributes | None:
        """Return the attributes of a name in a listing, looked up once more; None if it is gone."""
        found = await self._in_upper(self._upper.lookup, folder, name)
        if found is not None:
            return _upper_attributes(found)
        key = lazy.get(os.fsdecode(name))
        if key is None:
            return None
        image = await self._catalog.image_of(key)
        self._images[image.inode] = image
        return self._lazy_attributes(image)

    # ── files ──

    @_never_raises
    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            # As for a file that chattr(1) made immutable; the upper folder cannot be written through the mount yet.
            raise pyfuse3.FUSEError(errno.EROFS if inode & INODE_BIT else errno.EPERM)
        if inode & INODE_BIT:
            await self._in_upper(self._upper.open, inode, flags)
            return pyfuse3.FileInfo(fh=inode, keep_cache=False)
        image = await self._image(inode)
        image.opened()
        await self._catalog.used(image)
        return pyfuse3.FileInfo(fh=inode, keep_cache=True)

    @_never_raises
    async def release(self, fh: int) -> None:
        if fh & INODE_BIT:
            await self._in_upper(self._upper.release, fh)
            return
        image = await self._image(fh)
        image.closed()
        await self._catalog.used(image)

    @_never_raises
    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if inode & INODE_BIT or inode == ROOT_INODE:
            raise pyfuse3.FUSEError(errno.EROFS)
        if fields.update_size or fields.update_mode or fields.update_uid or fields.update_gid:
            raise pyfuse3.FUSEError(errno.EPERM)
        image = await self._image(inode)
        if fields.update_mtime:
            await self._catalog.set_mtime(image, attr.st_mtime_ns)
        return self._lazy_attributes(image)

    @_never_raises
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        found = await self._in_upper(self._upper.statistics)
        data = pyfuse3.StatvfsData()
        for name in (
            "f_bsize",
            "f_frsize",
            "f_blocks",
            "f_bfree",
            "f_bavail",
            "f_files",
            "f_ffree",
            "f_favail",
        ):
            setattr(data, name, getattr(found, name))
        data.f_namemax = found.f_namemax
        return data

    # ── what handlers share ──

    async def _image(self, inode: int) -> LazyImage:
        """Return the image of an inode, also of one that an earlier daemon told the kernel.  ESTALE: look again."""
        image = self._images.get(inode)
        if image is None or image.is_dropped:
            self._images.pop(inode, None)
            key = self._catalog.key_of_inode(inode)
            if key is None:
                raise pyfuse3.FUSEError(errno.ESTALE)
            try:
                image = self._images[inode] = await self._catalog.image_of(key)
            except KeyError:
                # Evicted since the kernel looked it up; it will look again, and find it again.
                raise pyfuse3.FUSEError(errno.ESTALE) from None
        return image

    def _lazy_attributes(self, image: LazyImage) -> pyfuse3.EntryAttributes:
        entry = self._catalog.entry_of(image)
        attributes = _attributes(image.inode, LAZY_MODE, image.size_bytes)
        attributes.st_blocks = -(-image.present_bytes // 512)
        mtime_ns = 0 if entry is None else entry.mtime_ns or int(entry.last_used_s * 1e9)
        attributes.st_mtime_ns = attributes.st_ctime_ns = attributes.st_atime_ns = mtime_ns
        return attributes

    def _link_attributes(self, image: LazyImage) -> pyfuse3.EntryAttributes:
        return _link_attributes(self._catalog.link_inode(image), len(image.record.base_name))

    async def _in_upper(self, function: Callable[..., T], *args: object) -> T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._upper_limiter)


def _cookie(name: bytes) -> int:
    """Return a name's place in a listing: from 1 up to 2**62, since the kernel's offsets are signed."""
    return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 2) + 1


def _attributes(inode: int, mode: int, size_bytes: int) -> pyfuse3.EntryAttributes:
    attributes = pyfuse3.EntryAttributes()
    attributes.st_ino = inode
    attributes.st_mode = mode
    attributes.st_nlink = 1
    attributes.st_size = size_bytes
    attributes.st_blksize = 1 << 16
    attributes.entry_timeout = ENTRY_TIMEOUT_S
    attributes.attr_timeout = ATTR_TIMEOUT_S
    return attributes


def _link_attributes(inode: int, size_bytes: int) -> pyfuse3.EntryAttributes:
    return _attributes(inode, LINK_MODE, size_bytes)


def _upper_attributes(found: os.stat_result, inode: int | None = None) -> pyfuse3.EntryAttributes:
    attributes = _attributes(inode or found.st_ino | INODE_BIT, found.st_mode, found.st_size)
    for name in ("st_nlink", "st_uid", "st_gid", "st_rdev", "st_blksize", "st_blocks"):
        setattr(attributes, name, getattr(found, name))
    for name in ("st_atime_ns", "st_mtime_ns", "st_ctime_ns"):
        setattr(attributes, name, getattr(found, name))
    return attributes
