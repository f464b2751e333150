"""What each error of ours becomes for a program that uses the mount: the one table of errno numbers."""

from __future__ import annotations

import errno

from lazyimg.errors import (
    ChunkAbsent,
    ChunkDamaged,
    ChunkUnreadable,
    GlanceUnavailable,
    ImageChanged,
    ImageForbidden,
    ImageNotFound,
    ImageQuarantined,
    ImageRefused,
    LazyImgError,
    LookupUndecided,
    ReadTimeout,
    SourceDamaged,
    SourceDoubted,
    WholeBody,
)

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
    ChunkUnreadable: errno.EIO,
    SourceDamaged: errno.EIO,
    SourceDoubted: errno.EIO,
    ImageChanged: errno.EIO,
    ImageQuarantined: errno.EIO,
    LookupUndecided: errno.EAGAIN,
}
