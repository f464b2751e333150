"""Lazy images as files of the mount: names, attributes, handles; immutable but for their times and their names.

A handle is the image's inode number, and that a function of its identity and view: the next daemon understands
both.  Methods raise OSError with the errno that a file made immutable with chattr(1) would give.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
from collections.abc import Callable

import pyfuse3

from lazyimg.core.identity import is_base_name, is_image_id
from lazyimg.daemon.attributes import lazy_attributes, link_attributes
from lazyimg.daemon.handles import Handles
from lazyimg.daemon.upper import Change
from lazyimg.errors import ConfigError
from lazyimg.image.catalog import Catalog
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.entry import ImageEntry


class LazyFiles:
    """The images of `catalog` in the mount's root folder.

    `permissions` and `owner` (user and group, asked each time) are what all of them show; `handles` outlive us.
    `mtime_shift_ns`: of an inode, as of KernelPages.
    """

    def __init__(
        self,
        catalog: Catalog,
        permissions: int,
        owner: Callable[[], tuple[int, int]],
        handles: Handles,
        *,
        mtime_shift_ns: Callable[[int], int],
    ) -> None:
        # By inode number; filled when they are looked up or opened, so that a read finds its own at once.
        self.images: dict[int, LazyImage] = {}
        self._catalog = catalog
        self._permissions = permissions
        self._owner = owner
        self._handles = handles
        self._mtime_shift_ns = mtime_shift_ns

    # ── names ──

    async def lookup(self, name: bytes) -> pyfuse3.EntryAttributes | None:
        """Return the attributes of an image's name, or of the link from its id; None if there is no such image.

        Raises LookupUndecided.
        """
        text = os.fsdecode(name)
        if not (is_base_name(text) or is_image_id(text)):
            return None
        image = await self._catalog.lookup(text)
        if image is None:
            return None
        if is_image_id(text):
            return link_attributes(self._catalog.link_inode(image), image.record.base_name)
        return self._shown(image)

    def is_shown(self, name: bytes) -> bool:
        """True if a lookup of this name would be answered at once with an image or a link to one."""
        return self._catalog.is_published(os.fsdecode(name))

    def listed(self) -> dict[bytes, ImageEntry]:
        """Return the names that a listing shows, with what `listed_attributes` needs."""
        return {os.fsencode(name): entry for name, entry in self._catalog.names_in_use().items()}

    def listed_attributes(self, entry: ImageEntry) -> pyfuse3.EntryAttributes:
        """Return the attributes of a listed image, which may be dropped by now; the cache disk is not asked."""
        inode = entry.record.inode(entry.view)
        image = self.images.get(inode)
        present_bytes = entry.present_bytes if image is None else image.present_bytes
        return self._attributes(inode, entry.size_bytes, present_bytes, entry)

    async def hide(self, name: bytes) -> None:
        """Take a name away until it is looked up again.  ENOENT if it is no image's, EPERM if it is a link."""
        text = os.fsdecode(name)
        if not self._catalog.is_published(text):
            raise FileNotFoundError(errno.ENOENT, "no such file")
        if not is_base_name(text):
            raise PermissionError(errno.EPERM, "the link belongs to the image")
        await self._catalog.hide(text)

    async def replaced(self, name: bytes) -> None:
        """A real file took a name over; that ends an image's use here as an unlink would."""
        if is_base_name(os.fsdecode(name)):
            await self.hide(name)

    # ── by inode ──

    async def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Return the attributes of an image or of a link."""
        target = self._catalog.link_target(inode)
        if target is not None:
            return link_attributes(inode, target)
        return self._shown(await self.image(inode))

    def target(self, inode: int) -> bytes:
        """Return what a link points to."""
        target = self._catalog.link_target(inode)
        if target is None:
            raise _stale()
        return target.encode()

    async def open(self, inode: int, flags: int) -> None:
        """Open an image for reading, EROFS for writing.

        libvirt opens a base for writing to lock it when a guest ends; any other errno is an error in its log.
        """
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise OSError(errno.EROFS, "images cannot be written")
        image = await self.image(inode)
        self._handles.opened(inode)
        image.opened()
        await self._catalog.used(image)

    async def release(self, inode: int, count: int) -> None:
        """Close so many handles."""
        is_known = self._catalog.key_of_inode(inode) is not None
        # Before the count goes down: an image not used yet since the last daemon takes its count from there.
        image = await self.image(inode) if is_known else None
        self._handles.closed(inode, count)
        if image is not None:
            image.closed(count)
            await self._catalog.released(image)

    async def change(self, inode: int, change: Change) -> pyfuse3.EntryAttributes:
        """Set the mtime, which sticks; the atime is not kept; all else is refused."""
        if (change.mode, change.uid, change.gid, change.size_bytes) != (None, None, None, None):
            raise PermissionError(errno.EPERM, "images cannot be changed")
        image = await self.image(inode)
        if change.mtime_ns is not None:
            await self._catalog.set_mtime(image, change.mtime_ns)
        return self._shown(image)

    async def image(self, inode: int) -> LazyImage:
        """Return the image of an inode, also of one that an earlier daemon told the kernel.  ESTALE: look again."""
        image = self.images.get(inode)
        if image is None or image.is_dropped:
            self.images.pop(inode, None)
            key = self._catalog.key_of_inode(inode)
            if key is None:
                raise _stale()
            try:
                image = self.images[inode] = await self._catalog.image_of(key)
            except KeyError:
                raise _stale() from None
        return image

    def _shown(self, image: LazyImage) -> pyfuse3.EntryAttributes:
        self.images[image.inode] = image
        entry = self._catalog.entry_of(image)
        return self._attributes(image.inode, image.size_bytes, image.present_bytes, entry)

    def _attributes(
        self, inode: int, size_bytes: int, present_bytes: int, entry: ImageEntry | None
    ) -> pyfuse3.EntryAttributes:
        mtime_ns = 0 if entry is None else entry.mtime_ns or int(entry.last_used_s * 1e9)
        return lazy_attributes(
            inode,
            self._permissions,
            self._owner(),
            size_bytes,
            present_bytes,
            mtime_ns + self._mtime_shift_ns(inode),
        )


def parse_owner(text: str) -> tuple[int, int]:
    """Return user and group of "user", which means its own group, or "user:group", by name or number.

    Raises ConfigError.
    """
    user, _, group = text.partition(":")
    try:
        record = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
        uid, own_gid = record.pw_uid, record.pw_gid
    except KeyError:
        if not user.isdigit() or not group:
            raise ConfigError(f"config key 'image_owner': no user {user!r}; give user:group") from None
        uid, own_gid = int(user), 0
    if not group:
        return uid, own_gid
    try:
        return uid, int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"config key 'image_owner': no group {group!r}; give user:group") from None


def _stale() -> OSError:
    return OSError(errno.ESTALE, "look it up again")
