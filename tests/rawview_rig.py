"""A decoded image, wired as the daemon does, on the Glance in memory of image_fakes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import trio
from image_fakes import MIB, ImageRig, Reply
from store_images import image_entry

from lazyimg.core.header import HEAD_SIZE_BYTES
from lazyimg.core.identity import ImageRecord
from lazyimg.core.qcow2 import parse_header
from lazyimg.errors import GlanceUnavailable
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.maker import FetchLimits, ImageMaker, Shared
from lazyimg.image.rawview import Qcow2View


def raw_maker(rig: ImageRig, *, request_bytes_max: int = MIB) -> ImageMaker:
    """Return what makes images of the raw view."""
    shared = Shared(
        rig.slots,
        rig.slow_streams,
        rig.budget,
        rig.unstored,
        rig.disk,
        rig.read_limiter,
        rig.write_limiter,
        rig.hash_limiter,
        rig.decoding,
    )
    limits = FetchLimits(request_bytes_max, 256 << 10, rig.read_timeout_s, 5, MIB)
    return ImageMaker(
        rig.glance,
        rig.space,
        rig.cache.spools.open,
        shared,
        rig.nursery,
        view="raw",
        limits=limits,
        forget_pages=rig.forgotten.append,
        has_news=rig.has_news,
    )


def add_qcow2(rig: ImageRig, number: int, source: bytes) -> ImageRecord:
    """Upload a qcow2 and give it an entry here, nothing of it present."""
    digest = hashlib.sha512(source).hexdigest()
    record = rig.glance.add(number, len(source), disk_format="qcow2", os_hash_value=digest)
    rig.glance.contents[record.id] = lambda start, stop: source[start:stop]
    size_bytes = parse_header(source, len(source)).virtual_size_bytes
    entry = replace(image_entry(number, len(source)), record=record, view="raw", size_bytes=size_bytes)
    rig.cache.index.put(entry)
    return record


async def open_raw(rig: ImageRig, number: int, source: bytes, **limits: int) -> LazyImage:
    """Upload a qcow2 and open it here; its head is in the cache, as after a publication, and nothing else."""
    return await open_again(rig, add_qcow2(rig, number, source), source[:HEAD_SIZE_BYTES], **limits)


async def open_again(
    rig: ImageRig, record: ImageRecord, head: bytes | None = None, **limits: int
) -> LazyImage:
    """Open an image, as the next daemon would where no head is given."""
    key = record.key("raw")
    rig.cache.close_image(key)
    return await raw_maker(rig, **limits).make(record, rig.cache.open_image(key), head)


def view_of(image: LazyImage) -> Qcow2View:
    """Return the image's view, to see what it keeps."""
    view = image.fetcher._view
    assert isinstance(view, Qcow2View)
    return view


def lie(rig: ImageRig, changes: dict[int, bytes], times: int) -> None:
    """Let the next `times` answers that cover these source bytes carry others."""
    (record,) = rig.glance.records.values()
    honest = rig.glance.contents[record.id]
    left = dict.fromkeys(changes, times)

    def content(start: int, stop: int) -> bytes:
        data = bytearray(honest(start, stop))
        for at, changed in changes.items():
            if start <= at and at + len(changed) <= stop and left[at]:
                left[at] -= 1
                data[at - start : at - start + len(changed)] = changed
        return bytes(data)

    rig.glance.contents[record.id] = content


def held() -> Reply:
    """Return a reply that comes when its gate is opened."""
    return Reply(gate=trio.Event())


def broken(after_bytes: int) -> Reply:
    """Return a reply that breaks off."""
    return Reply(length_bytes=after_bytes, then=GlanceUnavailable("broken off"))
