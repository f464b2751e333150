"""Which names stand for which images, and whether they may be shown.

A name appears only after its image's first bytes have arrived and passed `core.header.judge` (I8).  What is
known here never waits for Glance; what is not is decided in the background, one decision a name, and whoever
asks waits for it no longer than `lookup_timeout` (I6).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from weakref import WeakValueDictionary

import trio

from lazyimg.core.header import HEAD_SIZE_BYTES, Verdict, as_raw, is_decoded, judge, judge_record
from lazyimg.core.identity import BASE_NAME_OF_NOTHING, ImageRecord, base_name, is_image_id
from lazyimg.errors import (
    GlanceUnavailable,
    ImageForbidden,
    ImageNotFound,
    ImageRefused,
    LazyImgError,
    LookupUndecided,
)
from lazyimg.image.decisions import Decisions, Refusals
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.eviction import Eviction
from lazyimg.image.lazyimage import LazyImage, SourceHash
from lazyimg.image.listing import Listing, Records
from lazyimg.image.maker import Maker
from lazyimg.image.openimages import FetchTotals, OpenImages
from lazyimg.image.states import ACTIVE, CHANGED, JUDGING, States
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry

logger = logging.getLogger(__name__)

# Stands for a view in the inode numbers of links.
LINK = "link"


class Catalog:
    """All images that have a name here, and the way others get one."""

    def __init__(
        self,
        glance: Records,
        cache: CacheDir,
        states: States,
        maker: Maker,
        nursery: trio.Nursery,
        disk: DiskHealth,
        limiter: trio.CapacityLimiter,
        *,
        view: str,
        lookup_timeout_s: float,
        negative_ttl_s: float,
        open_files_max: int,
        handles: Mapping[int, int] | None = None,
    ) -> None:
        self._glance = glance
        self._listing = Listing(glance)
        self._cache = cache
        self._disk = disk
        self._maker = maker
        self._nursery = nursery
        self._limiter = limiter
        self._view = view
        self._lookup_timeout_s = lookup_timeout_s
        # Published: key by name.
        self._keys: dict[str, str] = {}
        self._keys_by_inode: dict[int, str] = {}
        self._link_targets: dict[int, str] = {}
        # By key, for as long as anybody holds one or waits for it.
        self._judging: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()
        self._states = states
        for entry in sorted(self._states.all(), key=lambda entry: entry.last_used_s):
            # One whose judgement was cut short is judged anew when it is asked for.
            if entry.view == view and entry.state != JUDGING:
                self._publish(entry)
                if entry.state == CHANGED:
                    # Its inode is known to who has it open, its name is another image's.
                    self._unpublish(entry)
        # Open since before this daemon, by inode.
        handed_over = {self._keys_by_inode.get(inode): count for inode, count in (handles or {}).items()}
        held = {key: count for key, count in handed_over.items() if key is not None}
        self._opened = OpenImages(cache, self._states, maker, disk, limiter, held, open_files_max)
        self._eviction = Eviction(self._glance, self._states, self._opened, self._forget)
        # Asked and not published.
        self._decisions = Decisions(
            nursery,
            self._decide,
            lookup_timeout_s=lookup_timeout_s,
            negative_ttl_s=negative_ttl_s,
        )
        self._refusals = Refusals(view)

    # ── by name ──

    async def lookup(self, name: str) -> LazyImage | None:
        """Return the image of a base name or an image id, None if there is none to show.

        Raises LookupUndecided if that is not known in time; the work goes on.
        """
        if name == BASE_NAME_OF_NOTHING:
            return None
        key = self._keys.get(base_name(name) if is_image_id(name) else name)
        if key is None:
            return await self._decisions.wait(name)
        # Opening one asks nobody, unless its header is lost from the cache: a folder's lock is held meanwhile.
        with trio.move_on_after(self._lookup_timeout_s):
            return await self.image_of(key)
        raise LookupUndecided(f"{name}: not opened yet; look it up again")

    async def find(self, image: str) -> LazyImage:
        """Return the image with this id, or with this name if only one has it.

        Raises ImageNotFound, ImageRefused with the reason, or GlanceUnavailable.
        """
        if not is_image_id(image):
            return await self._find_by_name(image)
        known = self._entry_of_id(image)
        try:
            record = await self._glance.image(image)
        except GlanceUnavailable:
            if known is None:
                raise
            return await self.image_of(known.key)
        except (ImageNotFound, ImageForbidden) as exc:
            if known is None:
                raise
            await self.seen(known, exc)
            found = await self.image_of(known.key)
            if not found.is_whole:
                raise
            return found
        return await self._present(record)

    async def _find_by_name(self, name: str) -> LazyImage:
        known = {e.record.id: e.record for e in self._entries() if e.record.name == name}
        try:
            records = {r.id: r for r in await self._listing.named(name)}
        except GlanceUnavailable:
            if not known:
                raise
            records = known
        if not records:
            raise ImageNotFound(
                f"image {name!r}: Glance has none of that id or name; see `openstack image list`"
            )
        if len(records) > 1:
            raise ImageNotFound(f"image {name!r}: {len(records)} images have that name; give an id")
        record = next(iter(records.values()))
        return await (self.find(record.id) if records is known else self._present(record))

    # ── by inode and key ──

    def key_of_inode(self, inode: int) -> str | None:
        return self._keys_by_inode.get(inode)

    async def image_of(self, key: str) -> LazyImage:
        """Return a published image, opening its chunk file if that is not open.  Raises KeyError or OSError."""
        return await self._opened.open(key)

    def key_of(self, image: str) -> str | None:
        """Return the key of a published image by its id, or by its name if only one has it.  Raises ImageNotFound."""
        keys = {e.key for e in self._entries() if image in (e.record.id, e.record.name)}
        if len(keys) > 1:
            raise ImageNotFound(f"image {image!r}: {len(keys)} images here have that name; give an id")
        return next(iter(keys), None)

    async def verdict(self, image: LazyImage) -> Verdict:
        """Return how a published image is presented."""
        if is_decoded(image.record, self._view):
            return Verdict("raw", image.size_bytes)
        return judge(await image.read(0, HEAD_SIZE_BYTES, for_lookup=True), image.record, self._view)

    def entry_of(self, image: LazyImage) -> ImageEntry | None:
        return self._states.get(image.record.key(self._view))

    # ── all of them ──

    def open_images(self) -> list[LazyImage]:
        """Return the images whose chunk file is open."""
        return self._opened.all()

    def fetch_totals(self) -> FetchTotals:
        """Return what all images cost since the daemon started."""
        return self._opened.totals()

    async def held_images(self) -> list[LazyImage]:
        """Return the images that guests hold open, or may since a daemon before this one."""
        return await self._opened.held(self._lookup_timeout_s)

    def handles_of(self, key: str) -> int:
        """Return how many handles guests have of an image, also of one that was not used since they were opened."""
        return self._opened.handles_of(key)

    def entries(self) -> list[tuple[ImageEntry, LazyImage | None]]:
        """Return what the index has of each published image, with the image itself if it is open."""
        # Those of a changed identity have lost their name to another, and may be open.
        keys = dict.fromkeys([*self._keys.values(), *self._keys_by_inode.values()])
        found = (self._states.get(key) for key in keys)
        return [(entry, self._opened.get(entry.key)) for entry in found if entry is not None]

    def watched(self) -> list[ImageEntry]:
        """Return the entries of images that are in use here."""
        held = self._opened.held_keys()
        return [entry for entry, _ in self.entries() if entry.in_use or entry.key in held]

    def refusals(self) -> list[tuple[ImageRecord, str]]:
        """Return the images that are not shown, with the reason."""
        return self._refusals.all()

    def names_in_use(self) -> dict[str, ImageEntry]:
        """Return the base names that a listing shows, those used here, with what the index has of each."""
        return {entry.record.base_name: entry for entry in self._entries() if entry.in_use}

    def is_published(self, name: str) -> bool:
        """True if this base name or image id can be answered without asking Glance."""
        return (base_name(name) if is_image_id(name) else name) in self._keys

    def link_inode(self, image: LazyImage) -> int:
        """Return the inode number of the image's <uuid> link."""
        return image.record.inode(LINK)

    def link_target(self, inode: int) -> str | None:
        """Return where the link with this inode number points to, None if there is no such link."""
        return self._link_targets.get(inode)

    # ── changes ──

    async def used(self, image: LazyImage) -> None:
        """Note that the image is used now; its first use gives it its mtime and a place in the listing."""
        entry = self.entry_of(image)
        if entry is not None:
            await self._states.used(entry)

    async def set_mtime(self, image: LazyImage, mtime_ns: int) -> None:
        """Keep an mtime, across restarts; the image is in use from here on."""
        entry = self.entry_of(image)
        if entry is not None:
            await self._states.mark(entry, mtime_ns=mtime_ns, in_use=True)

    async def seen(self, entry: ImageEntry, seen: ImageRecord | LazyImgError) -> None:
        """Note what Glance answered when it was asked for an image's record: that, or its absence."""
        entry = await self._states.seen(entry, self._opened.get(entry.key), seen)
        if entry.state == CHANGED:
            # Whoever holds it open goes on with what is here; its name leads to what Glance has now.
            self._unpublish(entry)
            if entry.key not in self._opened.held_keys():
                self._nursery.start_soon(self._eviction.drop_unused, entry.key)

    async def hashed(self, image: LazyImage, outcome: SourceHash) -> None:
        """Note what came of comparing a whole image with Glance's hash of its source."""
        entry = self.entry_of(image)
        if entry is not None:
            await self._states.hashed(entry, image, outcome)

    async def released(self, image: LazyImage) -> None:
        """A handle was released; with the last one of an image hidden since it was opened, its chunks go."""
        entry = self.entry_of(image)
        if entry is None:
            return
        if entry.in_use:
            await self.used(image)
        elif not image.open_handles:
            self._nursery.start_soon(self._eviction.drop_unused, entry.key)

    async def tidy(self) -> None:
        """Store what a failing disk did not take before, and close chunk files above the limit; now and then."""
        await self._states.save()
        await self._opened.close_idle_files()

    async def hide(self, name: str) -> None:
        """End the use of a base name's image here: it is not listed, and its next use is its first.

        Its chunks go with the last handle, unless Glance lacks the image.  The next lookup finds it again.
        """
        entry = self._states.get(self._keys.get(name, ""))
        if entry is None:
            return
        await self._states.mark(entry, in_use=False, mtime_ns=0)
        image = self._opened.get(entry.key)
        if image is None or not image.open_handles:
            self._nursery.start_soon(self._eviction.drop_unused, entry.key)

    def busy_keys(self) -> set[str]:
        """Return the images that must not be dropped now: open, being fetched, or all that is left of them."""
        return self._eviction.busy_keys()

    async def evict(self, key: str) -> int:
        """Drop an image's chunks; see `Eviction.evict`."""
        return await self._eviction.evict(key)

    async def try_evict(self, key: str) -> bool:
        """Drop an image to make room; False if it may not be dropped after all."""
        return await self._eviction.try_evict(key)

    # ── decisions ──

    async def _decide(self, name: str) -> LazyImage:
        return await self._present(
            await (self._glance.image(name) if is_image_id(name) else self._listing.record(name))
        )

    async def _present(self, record: ImageRecord) -> LazyImage:
        """Return the image of this record, published; judge it first if it is not.  Raises ImageRefused."""
        key = record.key(self._view)
        # Several names may lead here at once, and by `find` none: one of them judges.
        async with self._judging.setdefault(key, trio.Lock()):
            if self._keys.get(record.base_name) == key:
                entry = self._states.get(key)
                if entry is not None:
                    await self.seen(entry, record)
                return await self.image_of(key)
            other = self._entry_of_id(record.id)
            if other is not None:
                await self.seen(other, record)
            self._refusals.check(record)
            if record.status != "active" or record.size_bytes is None:
                reason = f"image {record.id}: its status is {record.status}; it must be active"
                raise self._refusals.note(record, ImageRefused(reason))
            return await self._judged(record)

    async def _judged(self, record: ImageRecord) -> LazyImage:
        """Judge an image by its record and first bytes, and publish it or leave nothing of it."""
        try:
            judge_record(record)
            try:
                return await self._first_bytes_judged(record)
            except ImageForbidden:
                raise
            except ImageRefused as exc:
                # What came may have been a lie of the network; one must not hide an image for good.
                logger.info("asking again for what was refused: %s", exc)
                return await self._first_bytes_judged(record)
        except ImageForbidden:
            # Says nothing of its content; these credentials may be given the right to read it.
            raise
        except ImageRefused as exc:
            raise self._refusals.note(record, exc) from exc

    async def _first_bytes_judged(self, record: ImageRecord) -> LazyImage:
        """Have the first presented bytes here, so that inspection is served locally, and publish the image."""
        record_judged, head, size_bytes = record, None, record.size_bytes or 0
        if is_decoded(record, self._view):
            head = await self._maker.read_head(record)
            size_bytes = judge(head, record, self._view).virtual_size_bytes
            # What a guest wrote into its disk must not be taken for a format either.
            record_judged = as_raw(record, size_bytes)
        entry = ImageEntry(record, self._view, size_bytes, last_used_s=time.time(), state=JUDGING)
        await self._eviction.finish(entry.key)
        await self._states.add(entry)
        try:
            image = await self._opened.open(entry.key, head)
            judge(await image.read(0, HEAD_SIZE_BYTES, for_lookup=True), record_judged, self._view)
        except ImageForbidden:
            raise
        except ImageRefused:
            self._opened.close(entry.key)
            await self._disk.write(self._cache.remove_image, entry.key, limiter=self._limiter)
            raise
        # Durably, or the next daemon would not know what a guest has open by then.
        await self._states.add(replace(entry, state=ACTIVE))
        self._refusals.forget(record)
        self._publish(entry)
        return image

    # ── entries ──

    def _publish(self, entry: ImageEntry) -> None:
        self._keys[entry.record.base_name] = entry.key
        self._keys_by_inode[entry.record.inode(self._view)] = entry.key
        self._link_targets[entry.record.inode(LINK)] = entry.record.base_name

    def _unpublish(self, entry: ImageEntry) -> None:
        if self._keys.get(entry.record.base_name) == entry.key:
            del self._keys[entry.record.base_name]

    def _forget(self, entry: ImageEntry) -> None:
        """An image is dropped: by a number that the kernel may have kept it is not opened before it is found again.

        It would be opened while it is judged, and the next daemon would not know what was.
        """
        self._unpublish(entry)
        self._keys_by_inode.pop(entry.record.inode(self._view), None)

    def _entries(self) -> list[ImageEntry]:
        found = (self._states.get(key) for key in self._keys.values())
        return [entry for entry in found if entry is not None]

    def _entry_of_id(self, image_id: str) -> ImageEntry | None:
        key = self._keys.get(base_name(image_id))
        return None if key is None else self._states.get(key)
