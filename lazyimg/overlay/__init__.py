"""The companion: an instance's files on top of images under the mount, as Nova would make them.

It asks the daemon for an image's facts and reads the image through the mount; it needs no credentials.  What
it makes appears whole under its final name or not at all.
"""

from lazyimg.overlay.disk import OverlayResult, create_overlay
from lazyimg.overlay.instance import InstanceResult, create_instance
from lazyimg.overlay.plainfile import PlainFileResult, fetch_plain

__all__ = [
    "InstanceResult",
    "OverlayResult",
    "PlainFileResult",
    "create_instance",
    "create_overlay",
    "fetch_plain",
]
