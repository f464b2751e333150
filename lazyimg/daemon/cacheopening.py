"""Opens the cache; where its disk does not let that be done, something in its stead until it does.

Guests whose daemon died must not wait for a disk that hangs, fails or is read-only.  So from a mount's second daemon on
there is a stand-in: an empty cache beside the control socket, with what the last daemon knew of the images, in which
nothing is ever stored, as its disk is taken for bypassed.  What probes that disk opens the real cache; when that
succeeds, another daemon shall have it:

    start ──► cache open ─────────────────────────────────────────────► served from the cache
       └────► OSError, or no answer within disk_timeout ──► stand-in ──► probe succeeds ──► planned restart ──► start
"""

from __future__ import annotations

import errno
import logging
import shutil
import threading
from contextlib import suppress
from dataclasses import replace

import trio

from lazyimg.config import Config
from lazyimg.daemon.handles import Handles
from lazyimg.daemon.holderlink import HolderLink
from lazyimg.daemon.lastentries import LastEntries
from lazyimg.errors import CacheUnusable, InUse, LazyImgError, RestartRefused
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.states import JUDGING
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index

logger = logging.getLogger(__name__)

# Names a chunk file that is never made: reads of one that has none would be taken for reads of absent chunks.
NO_GENERATION = "0" * 16
# A restart that was refused is asked for again after this.
RESTART_PAUSE_S = 5


class CacheOpening:
    """The cache of one daemon, or its stand-in, and the health of its disk."""

    def __init__(self, config: Config, last: LastEntries, handles: Handles, *, is_last_dying: bool) -> None:
        """is_last_dying: the daemon before may have the cache's lock until a disk answers."""
        self._config = config
        self._is_last_dying = is_last_dying
        self._last = last
        self._handles = handles
        self._cache: CacheDir | None = None
        self._stand_in = config.control.with_name(f"{config.control.name}.cache")
        self._lock = threading.Lock()
        self._is_given_up = False
        self._token = trio.lowlevel.current_trio_token()
        # Set when a stand-in has had its time.
        self._is_back = trio.Event()
        self.disk = DiskHealth(config.cache_dir, self._probe, timeout_s=config.disk_timeout)

    async def open(self) -> CacheDir:
        """Return the cache, or its stand-in; `disk` is watched meanwhile.  Raises CacheUnusable or InUse."""
        self.remove_stand_in()
        try:
            await self.disk.read(self.open_cache, limiter=trio.CapacityLimiter(1))
        except (CacheUnusable, InUse, OSError) as exc:
            is_passing = isinstance(exc, OSError) or isinstance(exc.__cause__, OSError)
            if isinstance(exc, InUse):
                is_passing = self._is_last_dying
            with self._lock:
                self._is_given_up = self._cache is None
            if self._cache is not None:
                # In the very last moment.
                return self._cache
            if self._last.found is None or not is_passing:
                if isinstance(exc, OSError):
                    raise CacheUnusable(f"{exc}; make it usable or give another") from exc
                raise
            self._cache = self._made_stand_in(self._last.found)
            self.disk.bypass(str(exc))
        assert self._cache is not None
        return self._cache

    async def return_when_back(self, link: HolderLink) -> None:
        """Have another daemon take the mount once the cache can be opened; for ever where this is no stand-in."""
        await self._is_back.wait()
        while True:
            logger.info("cache %s can be used again, by another daemon", self._config.cache_dir)
            try:
                await link.restart()
            except (InUse, RestartRefused) as exc:
                logger.warning("%s", exc)
            await trio.sleep(RESTART_PAUSE_S)

    def remove_stand_in(self) -> None:
        """Leave nothing of a stand-in, this daemon's or one's that was killed."""
        shutil.rmtree(self._stand_in, ignore_errors=True)

    def open_cache(self) -> None:
        """Open it, unless nobody waits for that any more (thread)."""
        cache = CacheDir(self._config.cache_dir, files_max=self._config.open_files_max)
        try:
            if self._last.found is not None:
                self._bring_up_to_date(cache.index, self._last.found)
        except OSError as exc:
            # It is told of what this daemon changes, and of the rest another time.
            logger.warning("what the last daemon knew is not stored yet: %s", exc)
        except BaseException:
            cache.close()
            raise
        with self._lock:
            if not self._is_given_up:
                self._cache = cache
                return
        # Nobody waits for it any more; the lock must go.
        cache.close()

    def _made_stand_in(self, entries: list[ImageEntry]) -> CacheDir:
        cache = CacheDir(self._stand_in)
        known = [entry for entry in entries if entry.state != JUDGING]
        cache.index.put(*known)
        for entry in known:
            cache.index.begin(entry.key, NO_GENERATION)
        return cache

    def _probe(self) -> None:
        if self._cache is not None and self._cache.path != self._stand_in:
            self._cache.probe()
            return
        if not self._is_back.is_set():
            self._probe_for_another()
        # This daemon goes on without it.
        raise OSError(errno.EIO, f"cache {self._config.cache_dir} is left to the next daemon")

    def _probe_for_another(self) -> None:
        """Return if the cache can be opened and written.  Raises OSError(EIO), also where the disk may be read."""
        try:
            cache = CacheDir(self._config.cache_dir)
            try:
                cache.probe()
            finally:
                cache.close()
        except (LazyImgError, OSError) as exc:
            raise OSError(errno.EIO, str(exc)) from exc
        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._is_back.set)

    def _bring_up_to_date(self, index: Index, entries: list[ImageEntry]) -> None:
        """Store what the last daemon knew and could not store: it was told of each change before the index was."""
        changed = []
        for entry in entries:
            known = index.get(entry.key)
            if entry.state == JUDGING:
                continue
            if known is None:
                # Dropped since, unless a guest has it open.
                if self._handles.count(entry.record.inode(entry.view)):
                    changed.append(replace(entry, generation="", present_count=0, verified=False))
                continue
            merged = replace(
                entry,
                generation=known.generation,
                present_count=known.present_count,
                verified=known.verified and entry.state == known.state,
            )
            if merged != known:
                changed.append(merged)
        if changed:
            index.put(*changed)
