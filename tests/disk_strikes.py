"""What befalls the operations of `passthrough_fs.py`: errors, delays and hanging, until it is healed."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import Any

import pyfuse3
import trio

CHANGES = ("write", "truncate", "setattr", "create", "mkdir", "link", "unlink", "rmdir", "rename")
SYNCS = ("fsync", "fsyncdir")
LOOKS = ("lookup", "getattr", "open", "opendir", "readdir", "read", "statfs")
OPS = (*LOOKS, *CHANGES, *SYNCS)


@dataclass(slots=True)
class Strike:
    """What befalls some operations; see passthrough_fs."""

    ops: frozenset[str]
    path: str
    error: int
    hang: bool
    delay_s: float
    count: int | None
    healed: trio.Event = field(default_factory=trio.Event)


class Strikes:
    """All strikes that are on.  hanging: requests that hang now.  struck: requests struck since the start."""

    def __init__(self) -> None:
        self._strikes: list[Strike] = []
        self.hanging = self.struck = 0

    @property
    def any(self) -> bool:
        return bool(self._strikes)

    def begin(self, request: dict[str, Any]) -> None:
        """Begin to strike; see passthrough_fs."""
        ops = frozenset(request["ops"] or OPS)
        assert ops <= set(OPS), ops
        keys = ("path", "error", "hang", "delay_s", "count")
        self._strikes.append(Strike(ops, *(request[key] for key in keys)))

    def heal(self) -> None:
        """End all strikes."""
        for strike in self._strikes:
            strike.healed.set()
        self._strikes.clear()

    async def befall(self, op: str, path: str) -> None:
        """Let an operation on a path wait and fail as the first strike that matches says."""
        for strike in self._strikes:
            if op in strike.ops and fnmatch.fnmatchcase(path, strike.path) and strike.count != 0:
                break
        else:
            return
        self.struck += 1
        if strike.count is not None:
            strike.count -= 1
        if strike.delay_s:
            await trio.sleep(strike.delay_s)
        if strike.hang:
            self.hanging += 1
            try:
                await strike.healed.wait()
            finally:
                self.hanging -= 1
        if strike.error:
            raise pyfuse3.FUSEError(strike.error)
