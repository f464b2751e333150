"""From where an image is read, and what a failed attempt says of that.

The ladder: ranges, or one stream where the image's store cannot serve them.  An image goes down it only on Glance's
own word, or on three whole bodies in a row without one good range; never on a single lie (I1).
"""

from __future__ import annotations

import logging
from typing import Literal

from lazyimg.errors import (
    ImageChanged,
    ImageForbidden,
    ImageNotFound,
    LazyImgError,
    RangesNotSupported,
    SourceDoubted,
    WholeBody,
)
from lazyimg.image.source import Glance, SourceKind

logger = logging.getLogger(__name__)

# Whole bodies in a row, without one good range, that make an image a stream: never a single lie.
WHOLE_BODIES_MAX = 3

Verdict = Literal["again", "stream", "final"]


class Ladder:
    """Where one image stands."""

    def __init__(self, image_id: str, glance: Glance, *, may_step_down: bool = True) -> None:
        """may_step_down: False where its ranges are of what somebody else makes of a stream; see spool.py."""
        self._image_id = image_id
        self._glance = glance
        self._whole_bodies = 0
        self._ranges_proven = False
        self._may_step_down = may_step_down
        self.source: SourceKind = "ranges"

    def range_came(self) -> None:
        """A range came as it was asked for: the store can do them."""
        self._ranges_proven = True
        self._whole_bodies = 0

    async def judge(self, error: LazyImgError) -> tuple[Verdict, LazyImgError]:
        """Return what to do after a failed attempt, and the error that says best why it failed."""
        if isinstance(error, RangesNotSupported) and self._may_step_down:
            return self._step_down(error)
        if isinstance(error, WholeBody) and self._may_step_down:
            self._whole_bodies += 1
            if self._whole_bodies >= WHOLE_BODIES_MAX and not self._ranges_proven:
                return self._step_down(error)
        if isinstance(error, ImageNotFound | ImageForbidden | SourceDoubted):
            return await self._as_the_record_says(error)
        return "again", error

    def _step_down(self, why: LazyImgError) -> tuple[Verdict, LazyImgError]:
        if self.source != "stream":
            logger.info("image %s: reading it as one stream: %s", self._image_id, why)
        self.source = "stream"
        return "stream", why

    async def _as_the_record_says(self, error: LazyImgError) -> tuple[Verdict, LazyImgError]:
        """Bytes alone that are refused are not final; the record says that the image is gone, or another."""
        try:
            record = await self._glance.image(self._image_id)
        except (ImageNotFound, ImageForbidden, ImageChanged) as exc:
            return "final", exc
        except LazyImgError as exc:
            return "again", exc
        except Exception:
            logger.exception("image %s: asking for its record failed in an unforeseen way", self._image_id)
            return "again", error
        if record.status == "deactivated":
            error = ImageForbidden(
                f"image {self._image_id}: deactivated in Glance, which keeps its bytes back; reactivate it"
            )
        return "again", error
