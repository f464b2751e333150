"""What the control socket is told: the daemon's side of `lazyimg status`, prefetch, evict and verify."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import asdict
from pathlib import Path

import trio

from lazyimg import __version__
from lazyimg.control.messages import ImageFacts, Progress
from lazyimg.core.identity import ImageRecord
from lazyimg.core.kernel import can_resend
from lazyimg.daemon import process
from lazyimg.daemon.holderlink import HolderLink
from lazyimg.daemon.inflight import InFlight, StuckRequests
from lazyimg.errors import LazyImgError
from lazyimg.glance.client import GlanceClient
from lazyimg.image.catalog import Catalog
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.lazyimage import LazyImage
from lazyimg.image.space import CacheSpace
from lazyimg.image.states import QUARANTINED
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry

# Steps reported but not yet read by the client; more of them are not worth keeping.
STEPS_MAX = 16


class Answers:
    """Implements `lazyimg.control.server.Daemon`."""

    def __init__(
        self,
        glance: GlanceClient,
        catalog: Catalog,
        cache: CacheDir,
        space: CacheSpace,
        in_flight: InFlight,
        stuck: StuckRequests,
        disk: DiskHealth,
        nursery: trio.Nursery,
        link: HolderLink,
        *,
        mountpoint: Path,
        view: str,
    ) -> None:
        self._started_at_s = time.time()
        self._glance = glance
        self._catalog = catalog
        self._cache = cache
        self._space = space
        self._in_flight = in_flight
        self._stuck = stuck
        self._disk = disk
        self._nursery = nursery
        self._link = link
        self._mountpoint = mountpoint
        self._view = view

    def status(self) -> dict[str, object]:
        """Return the JSON object of `lazyimg status --json`; docs/operations.md explains each field.

        Asks neither Glance nor a disk, so that it answers whatever hangs.
        """
        shown = [
            _image_status(entry, image, self._catalog.handles_of(entry.key))
            for entry, image in self._catalog.entries()
        ]
        refused = [_refused_status(record, reason) for record, reason in self._catalog.refusals()]
        totals = self._catalog.fetch_totals()
        own = process.statistics()
        asked = self._in_flight.statistics()
        disk = self._disk.statistics()
        return {
            "daemon_pid": os.getpid(),
            "holder_pid": self._link.holder_pid,
            "version": __version__,
            "started_at_s": self._started_at_s,
            "memory_bytes": own.memory_bytes,
            "descriptors": own.descriptors,
            "mountpoint": str(self._mountpoint),
            "view": self._view,
            "cache_is_full": self._space.is_full,
            "cache_used_bytes": self._space.used_bytes,
            "cache_found": asdict(self._cache.statistics()),
            "disk_state": disk.state,
            "disk_state_age_s": disk.state_age_s,
            "disk_is_read_only": disk.is_read_only,
            "disk_errors": disk.errors,
            "disk_error": disk.last_error,
            "disk_stuck_operations": disk.stuck_operations,
            "disk_bypassed_bytes": disk.bypassed_bytes,
            "requests": totals.requests,
            "fetched_bytes": totals.fetched_bytes,
            "retries": totals.retries,
            "unforeseen_errors": asked.unforeseen_errors,
            "survives_kill": can_resend(os.uname().release),
            "requests_in_flight": asked.in_flight,
            "requests_stuck": self._stuck.count,
            "reads_in_flight": asked.reads_in_flight,
            "reads_hung": asked.reads_hung,
            "oldest_read_s": asked.oldest_read_s,
            "reads": [asdict(read) for read in asked.reads],
            "glance": asdict(self._glance.statistics()),
            "images": shown + refused,
        }

    async def image_facts(self, image: str) -> ImageFacts:
        """Return what the companion must know of an image that can be presented."""
        found = await self._catalog.find(image)
        record = found.record
        assert record.size_bytes is not None
        verdict = await self._catalog.verdict(found)
        return ImageFacts(
            id=record.id,
            name=record.name,
            base_name=record.base_name,
            disk_format=record.disk_format,
            container_format=record.container_format,
            size_bytes=record.size_bytes,
            presented_size_bytes=found.size_bytes,
            presented_format=verdict.presented_format,
            view=self._view,
            mountpoint=str(self._mountpoint),
            min_disk_gib=record.min_disk_gib,
            os_hash_algo=record.os_hash_algo,
            os_hash_value=record.os_hash_value,
            checksum=record.checksum,
            properties=record.properties,
        )

    async def restart(self) -> int:
        """Let another daemon take over; return this one's pid, since it is about to end."""
        await self._link.restart()
        return os.getpid()

    async def give_up_mount(self) -> int:
        """End without unmounting, since another holder has the mount; return this daemon's pid."""
        await self._link.give_up_mount()
        return os.getpid()

    async def prefetch(self, image: str) -> AsyncIterator[Progress]:
        """Fetch all of an image; closing the iterator ends it."""
        found = await self._catalog.find(image)
        found.opened()
        try:
            yield Progress(0, found.size_bytes)
            async with aclosing(found.prefetch()) as steps:
                async for done_bytes in steps:
                    yield Progress(done_bytes, found.size_bytes)
            await found.commit()
            if not found.is_whole:
                raise LazyImgError(
                    f"image {found.record.id}: only {found.present_bytes} of {found.size_bytes} bytes could be "
                    "kept; make room on the cache disk or raise cache_size_max"
                )
        finally:
            found.closed()

    async def evict(self, image: str) -> int:
        """Drop an image's chunks and return the bytes freed; of an image that is not here, none."""
        key = self._catalog.key_of(image)
        return 0 if key is None else await self._catalog.evict(key)

    async def verify(self, image: str) -> AsyncIterator[Progress]:
        """Check an image's present chunks, and its source's hash where all are present."""
        found = await self._catalog.find(image)

        async def check(report: Callable[[Progress], None]) -> None:
            damaged_count, source_hash = await found.verify(
                lambda done_bytes, total_bytes: report(Progress(done_bytes, total_bytes))
            )
            await self._catalog.hashed(found, source_hash)
            report(Progress(found.present_bytes, found.present_bytes, damaged_count, source_hash))

        found.opened()
        try:
            async with aclosing(self._steps_of(check)) as steps:
                async for step in steps:
                    yield step
        finally:
            found.closed()

    async def _steps_of(
        self, work: Callable[[Callable[[Progress], None]], Awaitable[None]]
    ) -> AsyncGenerator[Progress, None]:
        """Run `work` in the daemon's nursery and yield what it reports, the last report in any case."""
        send, receive = trio.open_memory_channel[Progress](STEPS_MAX)
        scope = trio.CancelScope()
        outcome: list[Exception] = []
        last: list[Progress] = []

        def report(step: Progress) -> None:
            last[:] = [step]
            try:
                send.send_nowait(step)
            except trio.WouldBlock:
                # A client that reads slowly sees fewer steps.
                return
            last.clear()

        async def run() -> None:
            with scope, send:
                try:
                    await work(report)
                except Exception as exc:
                    # Raised to the client below; here it would end the daemon.
                    outcome.append(exc)

        self._nursery.start_soon(run)
        try:
            async for step in receive:
                yield step
            for step in last:
                yield step
            if outcome:
                raise outcome[0]
        finally:
            scope.cancel()


def _image_status(entry: ImageEntry, image: LazyImage | None, handles: int) -> dict[str, object]:
    record = entry.record
    present_bytes = entry.present_bytes
    fields: dict[str, object] = {
        "id": record.id,
        "name": record.name,
        "size_bytes": entry.size_bytes,
        "present_bytes": present_bytes,
        "fetched_bytes": 0,
        "requests": 0,
        "source": entry.source,
        "open_handles": handles,
    }
    state = entry.state
    if image is not None:
        now = image.statistics()
        fields |= {
            "present_bytes": now.present_bytes,
            "fetched_bytes": now.fetch.fetched_bytes,
            "requests": now.fetch.requests,
            "source": image.source,
            "retries": now.fetch.retries,
            "waiting_chunks": now.fetch.waiting_chunks,
            "last_error": now.fetch.last_error,
            "damaged_chunks": now.damaged_chunks,
        }
        present_bytes = now.present_bytes
    if state == "active":
        state = "whole" if present_bytes == entry.size_bytes else "lazy"
    missing_bytes = entry.size_bytes - present_bytes
    source_hash = "match" if entry.verified else "unchecked"
    if record.source_hash is None:
        source_hash = "unknown"
    elif entry.state == QUARANTINED:
        source_hash = "mismatch"
    if entry.reason:
        fields["reason"] = entry.reason
    return fields | {
        "state": state,
        "missing_bytes": missing_bytes,
        "source_hash": source_hash,
        # Its guests depend on Glance having it.
        "at_risk": handles > 0 and missing_bytes > 0,
    }


def _refused_status(record: ImageRecord, reason: str) -> dict[str, object]:
    return {
        "id": record.id,
        "name": record.name,
        "size_bytes": record.size_bytes or 0,
        "present_bytes": 0,
        "fetched_bytes": 0,
        "requests": 0,
        "source": "ranges",
        "open_handles": 0,
        "state": "refused",
        "reason": reason,
        "missing_bytes": record.size_bytes or 0,
        "source_hash": "unchecked",
        "at_risk": False,
    }
