"""What is being found out about names: one piece of work a name, in the background, and a limit for who waits.

Guards I6: no lookup hangs without end, and none of them costs another its time.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.errors import ImageNotFound, ImageRefused, LazyImgError, LookupUndecided
from lazyimg.image.lazyimage import LazyImage

logger = logging.getLogger(__name__)

# Names without an image, remembered at once.
NEGATIVE_MAX = 10_000
# Once a limit has run out with nothing decided, nobody waits for this long: those that the kernel kept waiting
# behind a create, which has the folder to itself, come now and would wait as long again.
REST_S = 1.0
# Names being decided at once; one more is undecided without being asked about.
RUNNING_MAX = 1000
# Refusals remembered at once.
REFUSALS_MAX = 1000


@dataclass(slots=True)
class _Decision:
    """What is being found out about one name."""

    done: trio.Event = field(default_factory=trio.Event)
    image: LazyImage | None = None
    error: LazyImgError | None = None


class Decisions:
    """The names that are being decided, and those that were found to stand for nothing."""

    def __init__(
        self,
        nursery: trio.Nursery,
        decide: Callable[[str], Awaitable[LazyImage]],
        *,
        lookup_timeout_s: float,
        negative_ttl_s: float,
    ) -> None:
        """Begin with none.

        decide: returns the image of a name; raises ImageNotFound or ImageRefused if none is shown.
        """
        self._nursery = nursery
        self._decide = decide
        self._lookup_timeout_s = lookup_timeout_s
        self._negative_ttl_s = negative_ttl_s
        self._running: dict[str, _Decision] = {}
        self._absent_until: dict[str, float] = {}
        self._waiting_count = 0
        self._deadline = float("-inf")
        # When that limit began, and when something was decided last.
        self._limit_began_at = float("-inf")
        self._decided_at = float("-inf")

    async def wait(self, name: str) -> LazyImage | None:
        """Return the image of a name, None if there is none to show.

        Raises LookupUndecided if that is not known in time; the work goes on.
        """
        if trio.current_time() < self._absent_until.get(name, float("-inf")):
            return None
        decision = self._running.get(name)
        if decision is None and len(self._running) >= RUNNING_MAX:
            raise LookupUndecided(f"{name}: {RUNNING_MAX} other names are being decided; look it up again")
        if decision is None:
            decision = self._running[name] = _Decision()
            self._nursery.start_soon(self._run, name, decision)
        # All who wait at once share one limit: a folder's lock is held while any of them does.
        now = trio.current_time()
        is_over = now >= self._deadline
        is_resting = is_over and self._decided_at < self._limit_began_at and now < self._deadline + REST_S
        if (not self._waiting_count or is_over) and not is_resting:
            self._limit_began_at, self._deadline = now, now + self._lookup_timeout_s
        self._waiting_count += 1
        try:
            with trio.move_on_at(self._deadline):
                await decision.done.wait()
        finally:
            self._waiting_count -= 1
        if not decision.done.is_set() or decision.error is not None:
            reason = decision.error or "Glance did not answer in time"
            raise LookupUndecided(f"{name}: not decided yet ({reason}); look it up again")
        return decision.image

    async def _run(self, name: str, decision: _Decision) -> None:
        try:
            decision.image = await self._decide(name)
        except (ImageNotFound, ImageRefused) as exc:
            if isinstance(exc, ImageRefused):
                logger.info("not shown: %s", exc)
            self._remember_absent(name)
        except LazyImgError as exc:
            decision.error = exc
        except OSError as exc:
            # The cache's disk: what is not known yet needs it, and may be asked again.
            logger.info("not decided: %s: %s", name, exc)
            decision.error = LookupUndecided(str(exc))
        except Exception as exc:
            logger.exception("deciding on %s failed in an unforeseen way", name)
            decision.error = LookupUndecided(f"internal error: {exc!r}")
        finally:
            del self._running[name]
            decision.done.set()
            self._decided_at = trio.current_time()

    def _remember_absent(self, name: str) -> None:
        now = trio.current_time()
        if len(self._absent_until) >= NEGATIVE_MAX:
            self._absent_until = {n: until for n, until in self._absent_until.items() if until > now}
        if len(self._absent_until) < NEGATIVE_MAX:
            self._absent_until[name] = now + self._negative_ttl_s


class Refusals:
    """The images that must not be shown, each with the record it was judged by and the reason."""

    def __init__(self, view: str) -> None:
        self._view = view
        self._by_id: dict[str, tuple[ImageRecord, ImageRefused]] = {}

    def all(self) -> list[tuple[ImageRecord, str]]:
        """Return each refused record with the reason."""
        return [(record, str(reason)) for record, reason in self._by_id.values()]

    def check(self, record: ImageRecord) -> None:
        """Raise ImageRefused if the image was refused and is what it was then."""
        judged, reason = self._by_id.get(record.id, (None, None))
        if judged is None or judged.status != record.status:
            return
        if judged.key(self._view) == record.key(self._view):
            raise ImageRefused(str(reason)) from reason

    def note(self, record: ImageRecord, reason: ImageRefused) -> ImageRefused:
        """Remember a refusal, and return its reason to be raised."""
        self._by_id[record.id] = (record, reason)
        while len(self._by_id) > REFUSALS_MAX:
            del self._by_id[next(iter(self._by_id))]
        return reason

    def forget(self, record: ImageRecord) -> None:
        """The image is shown now."""
        self._by_id.pop(record.id, None)
