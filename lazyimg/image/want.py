"""A chunk that somebody waits for, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from lazyimg.errors import LazyImgError


@dataclass(slots=True)
class Want:
    """Shared by all who wait for the chunk; `arrived` is set once either `data` or `error` is."""

    is_urgent: bool
    waiters: int = 0
    arrived: trio.Event = field(default_factory=trio.Event)
    data: bytes | None = None
    error: LazyImgError | None = None

    def outcome(self) -> bytes:
        """Return the chunk's bytes, or raise what kept them from coming."""
        if self.error is not None:
            # A fresh one for each reader: a shared exception would collect all their tracebacks.
            raise type(self.error)(str(self.error)) from self.error
        assert self.data is not None
        return self.data
