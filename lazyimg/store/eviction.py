"""Which images to drop when the cache is too large or its disk too full.  Pure: no files and no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lazyimg.store.entry import ImageEntry


def to_evict(
    images: Iterable[tuple[ImageEntry, int]],
    open_keys: Collection[str],
    pinned_keys: Collection[str],
    size_max_bytes: int,
    free_bytes: int,
    free_min_bytes: int,
) -> list[str]:
    """Return the keys of the images to drop, least recently used first; as few as make both limits hold.

    images: each entry with the bytes its chunk file takes on disk.  size_max_bytes: 0 for no limit.
    pinned_keys: images that Glance no longer has.  Open and pinned images are never returned (invariant 7),
    nor images that take no bytes; so the limits may still not hold when the list is through.
    """
    images = list(images)
    used_bytes = sum(allocated for _, allocated in images)
    evicted: list[str] = []
    for entry, allocated in sorted(images, key=lambda image: image[0].last_used_s):
        is_within_size = not size_max_bytes or used_bytes <= size_max_bytes
        if is_within_size and free_bytes >= free_min_bytes:
            break
        if allocated and entry.key not in open_keys and entry.key not in pinned_keys:
            evicted.append(entry.key)
            used_bytes -= allocated
            free_bytes += allocated
    return evicted
