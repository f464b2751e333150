"""Every error lazyimg raises on purpose.

    LazyImgError                     exit code 1
    ├── ConfigError                  2   a key, a value or a combination that cannot work
    ├── Unreachable                  3
    │   ├── DaemonUnreachable            no daemon answers on the control socket
    │   └── GlanceUnavailable            the only retryable one: a passing fault of Glance or Keystone
    │       ├── WholeBody                Glance sent the whole image where a range was asked
    │       └── SourceDoubted            Glance sent bytes that it says are of other content than the image's
    ├── ImageNotFound                4   Glance has no such image, or does not show it to us (404)
    ├── ImageRefused                 5   it exists and must not or cannot be presented
    │   ├── ImageForbidden               Glance refuses its record or its bytes (403)
    │   ├── ImageChanged                 Glance has other content under its id than when it was first seen
    │   ├── ImageQuarantined             what was fetched of it is not what Glance's hash of it says
    │   └── SourceDamaged                its own tables or compressed clusters are not what its format allows
    ├── InUse                        6   a mount, mountpoint, cache folder, socket or image is busy
    ├── DestinationRefused           7   a DEST that exists or a size that does not fit
    ├── CredentialsRefused           8   Keystone or Glance does not accept the credentials
    ├── CacheUnusable                9   the cache folder is of another version, another owner, or broken
    ├── MountFailed                 10   /dev/fuse or the mountpoint cannot be used
    ├── RestartRefused              11   another daemon cannot take over; the old one goes on
    ├── RangesNotSupported               this image's store cannot serve ranges (400)
    ├── ReadTimeout                      a read waited `read_timeout` and the bytes did not come
    ├── LookupUndecided                  a name could not be decided within `lookup_timeout`
    ├── ChunkAbsent                      chunks that were asked of the cache are not in it
    ├── ChunkUnreadable                  the disk failed to read chunks of the cache
    └── ChunkDamaged                     bytes in the cache are not those that were stored

Messages name the object and the next step, in one line.  `exit_code` is what the command line ends with.
"""

from __future__ import annotations

from collections.abc import Sequence


class LazyImgError(Exception):
    """Base of all errors of this package; its message is fit to show to a user."""

    exit_code = 1


class ConfigError(LazyImgError):
    """A configuration key, value or combination that cannot work."""

    exit_code = 2


class Unreachable(LazyImgError):
    """Something needed does not answer."""

    exit_code = 3


class DaemonUnreachable(Unreachable):
    """No daemon answers on the control socket."""


class GlanceUnavailable(Unreachable):
    """A passing fault of Glance, Keystone or the way to them; trying again is right.

    `retry_after_s` is what the server asked for (Retry-After, RFC 9110 §10.2.3), or None.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WholeBody(GlanceUnavailable):
    """Glance answered a range request with the whole image; three in a row mean that it cannot do ranges."""


class SourceDoubted(GlanceUnavailable):
    """Glance sent bytes that it says are of other content than the image's; its record decides."""


class ImageNotFound(LazyImgError):
    """Glance has no such image, or does not show it to these credentials."""

    exit_code = 4


class ImageRefused(LazyImgError):
    """The image exists and must not, or cannot, be presented; the message says why."""

    exit_code = 5


class ImageForbidden(ImageRefused):
    """Glance refuses the image's record or bytes to these credentials, or it is deactivated."""


class ImageChanged(ImageRefused):
    """Glance has other content under the image's id than when it was first seen; what is absent never comes."""


class ImageQuarantined(ImageRefused):
    """What was fetched of the image is not what Glance's hash of it says; no byte of it is served."""


class SourceDamaged(ImageRefused):
    """A part of the source is not what its format allows; other parts of the image may be readable."""


class InUse(LazyImgError):
    """A mount, mountpoint, cache folder, socket or image is busy; the message says with whom."""

    exit_code = 6


class DestinationRefused(LazyImgError):
    """A destination that already exists, or a size that does not fit."""

    exit_code = 7


class CredentialsRefused(LazyImgError):
    """Keystone or Glance does not accept the credentials."""

    exit_code = 8


class CacheUnusable(LazyImgError):
    """The cache folder is of another version, belongs to somebody else, or cannot be used."""

    exit_code = 9


class MountFailed(LazyImgError):
    """/dev/fuse or the mountpoint cannot be used."""

    exit_code = 10


class RestartRefused(LazyImgError):
    """Another daemon cannot take over, or the old one cannot let go; the old one goes on."""

    exit_code = 11


class RangesNotSupported(LazyImgError):
    """The store behind this image cannot serve ranges; only a sequential stream is possible."""


class ReadTimeout(LazyImgError):
    """A read waited as long as it may and the bytes did not come."""


class LookupUndecided(LazyImgError):
    """A name could not be decided in time; it may exist, asking again is right."""


class ChunkAbsent(LazyImgError):
    """Chunks that were asked of the cache are not in it; `chunks` says which."""

    def __init__(self, message: str, chunks: Sequence[int]) -> None:
        super().__init__(message)
        self.chunks = list(chunks)


class ChunkUnreadable(LazyImgError):
    """The disk failed to read chunks of the cache, which count as present still; caused by an OSError."""

    def __init__(self, message: str, chunks: Sequence[int]) -> None:
        super().__init__(message)
        self.chunks = list(chunks)


class ChunkDamaged(LazyImgError):
    """Bytes in the cache are not those that were stored; `chunks` says which, and they are absent now."""

    def __init__(self, message: str, chunks: Sequence[int]) -> None:
        super().__init__(message)
        self.chunks = list(chunks)
