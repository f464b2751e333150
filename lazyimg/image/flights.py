"""The flights of one image: tasks of the daemon's, never of the reader that came first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Flights:
    """Those that are under way; they count from the moment they are started."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scopes: set[trio.CancelScope] = set()
        self.is_stopped = False

    def __len__(self) -> int:
        return len(self._scopes)

    def start(self, flight: Callable[..., Awaitable[None]], *args: object) -> None:
        """Begin a flight."""
        scope = trio.CancelScope()
        self._scopes.add(scope)
        self._nursery.start_soon(self._run, scope, flight, args)

    def stop(self) -> None:
        """End all of them, for good."""
        self.is_stopped = True
        for scope in self._scopes:
            scope.cancel()

    async def _run(
        self, scope: trio.CancelScope, flight: Callable[..., Awaitable[None]], args: tuple[object, ...]
    ) -> None:
        try:
            with scope:
                await flight(*args)
        finally:
            self._scopes.discard(scope)
