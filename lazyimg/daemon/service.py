"""The daemon: wires everything, bottom up, in one function, and ends it in order.

Started by the holder, or whoever else keeps the descriptors, by systemd's protocol (sd_listen_fds(3)): `fuse`,
`upper` and `handover`.  What a read of present bytes does not need is imported once the mount answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pyfuse3
import trio

from lazyimg.config import Config, host_and_port
from lazyimg.daemon import mountpoint
from lazyimg.daemon.answers import Answers
from lazyimg.daemon.filesystem import Filesystem
from lazyimg.daemon.handshake import Resumption
from lazyimg.daemon.holder import LISTEN_FDS_START, Handover
from lazyimg.daemon.inflight import StuckRequests
from lazyimg.daemon.kernelpages import KernelPages
from lazyimg.daemon.lazyfiles import LazyFiles, parse_owner
from lazyimg.daemon.loop import quicken
from lazyimg.daemon.notify import notify
from lazyimg.daemon.upper import Upper
from lazyimg.errors import ConfigError, InUse, LazyImgError
from lazyimg.glance.auth import make_auth
from lazyimg.glance.client import GlanceClient
from lazyimg.image.catalog import Catalog
from lazyimg.image.hydrator import Hydrator
from lazyimg.image.maker import FetchLimits, ImageMaker, Shared
from lazyimg.image.recordwatch import RecordWatch
from lazyimg.image.slots import ByteBudget, FlightSlots
from lazyimg.image.space import CacheSpace
from lazyimg.store.cachedir import CacheDir

logger = logging.getLogger("lazyimg.daemon")

# What was written becomes durable this often: a crash costs at most so much fetching again.
COMMIT_INTERVAL_S = 1
# A task that failed in an unforeseen way is started again after this.
RESTART_PAUSE_S = 1


def main() -> int:
    """Run the daemon on the descriptors it was given; return the exit code."""
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    fds = {name: LISTEN_FDS_START + i for i, name in enumerate(names)}
    try:
        if not {"fuse", "upper", "handover"} <= fds.keys():
            raise ConfigError("the daemon is started by `lazyimg mount`, not by hand")
        with os.fdopen(fds["handover"], "rb") as memory:
            memory.seek(0)
            handover = Handover.from_json(memory.read().decode())
        for name in ("fuse", "upper"):
            os.set_inheritable(fds[name], False)
        logging.basicConfig(
            level=handover.config.log_level, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        trio.run(_serve, handover, fds["fuse"], fds["upper"])
    except LazyImgError as exc:
        return _failed(exc)
    except BaseExceptionGroup as group:
        ours, others = group.split(LazyImgError)
        if ours is None or others is not None:
            raise
        return _failed(_first_of(ours))
    return 0


def _failed(exc: LazyImgError) -> int:
    print(f"lazyimg: {exc}", file=sys.stderr)
    return exc.exit_code


def _first_of(group: BaseExceptionGroup[LazyImgError]) -> LazyImgError:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


async def _serve(handover: Handover, fuse_fd: int, upper_fd: int) -> None:
    """Serve the mount until it is unmounted."""
    config = handover.config
    cache = CacheDir(config.cache_dir)
    try:
        glance = _make_glance(config)
        shared = _make_shared(config)
        space = CacheSpace(
            cache,
            shared.cache_writes,
            size_max_bytes=config.cache_size_max,
            free_min_bytes=config.cache_free_min,
        )
        resumption = Resumption(fuse_fd, handover.init_request)
        async with trio.open_nursery() as nursery:
            watch = RecordWatch(glance)
            maker = ImageMaker(
                glance,
                space,
                shared,
                nursery,
                view=config.view,
                limits=FetchLimits(
                    config.request_bytes_max,
                    config.random_request_bytes_max,
                    config.read_timeout,
                    config.retry_pause_max,
                    config.tables_memory_max,
                ),
                forget_pages=KernelPages(nursery).forget_nowait,
                has_news=watch.wake,
            )
            catalog = Catalog(
                glance,
                cache,
                maker,
                nursery,
                trio.CapacityLimiter(config.cache_write_threads),
                view=config.view,
                lookup_timeout_s=config.lookup_timeout,
                negative_ttl_s=config.negative_ttl,
                is_resumed=handover.is_resumed,
            )
            await nursery.start(space.keep_room, catalog.busy_keys, catalog.try_evict)
            nursery.start_soon(_again_after_faults, _commit_now_and_then, catalog)
            nursery.start_soon(_again_after_faults, glance.keep_probing)
            nursery.start_soon(_again_after_faults, watch.run, catalog)
            if config.hydrate:
                hydrator = Hydrator(
                    catalog, space, delay_s=config.hydrate_delay, bytes_per_s=config.hydrate_rate
                )
                nursery.start_soon(_again_after_faults, hydrator.run)
            nursery.start_soon(_unmount_on_signals, handover.mountpoint)
            upper = Upper(upper_fd)
            owner = None if config.image_owner is None else parse_owner(config.image_owner)
            lazy = LazyFiles(catalog, int(config.image_mode, 8), lambda: owner or upper.owner)
            filesystem = Filesystem(
                lazy, upper, trio.CapacityLimiter(config.upper_threads), resumption.take_over
            )
            pyfuse3.init(filesystem, resumption.mountpoint, set(pyfuse3.default_options))
            nursery.start_soon(_serve_fuse, config, resumption, nursery.cancel_scope)
            stuck = StuckRequests(_waiting_path(handover.mountpoint), fuse_fd, filesystem.in_flight)
            nursery.start_soon(_again_after_faults, stuck.watch)
            answers = Answers(
                glance,
                catalog,
                cache,
                space,
                filesystem.in_flight,
                stuck,
                nursery,
                mountpoint=handover.mountpoint,
                view=config.view,
            )
            await _start_control(answers, config, nursery)
            if config.metrics_listen is not None:
                nursery.start_soon(_again_after_faults, _serve_metrics, answers, config.metrics_listen)
            notify("READY=1")
            logger.info("serving %s", handover.mountpoint)
        notify("STOPPING=1")
        await _commit(catalog)
        with trio.move_on_after(RESTART_PAUSE_S):
            await glance.aclose()
    finally:
        cache.close()


def _make_shared(config: Config) -> Shared:
    return Shared(
        FlightSlots(config.requests_max, config.background_requests_max),
        ByteBudget(config.write_buffer_max),
        trio.CapacityLimiter(config.cache_read_threads),
        trio.CapacityLimiter(config.cache_write_threads),
        trio.CapacityLimiter(1),
        trio.CapacityLimiter(config.decode_threads),
    )


def _make_glance(config: Config) -> GlanceClient:
    return GlanceClient(
        make_auth(config),
        connect_timeout_s=config.connect_timeout,
        first_byte_timeout_s=config.first_byte_timeout,
        between_bytes_timeout_s=config.between_bytes_timeout,
        # Records and lists are asked while all flights are out.
        connections_max=config.requests_max + config.background_requests_max,
        retry_pause_max_s=config.retry_pause_max,
    )


async def _serve_fuse(config: Config, resumption: Resumption, scope: trio.CancelScope) -> None:
    """Answer the kernel until the mount is gone, then end everything else."""
    try:
        quicken(resumption.session_fd)
        resumption.resend()
        await pyfuse3.main(max_tasks=config.tasks_max)
    finally:
        pyfuse3.close(unmount=False)
        scope.cancel()


def _waiting_path(where: Path) -> Path:
    """Return where the kernel says how many requests of this mount wait (Documentation/filesystems/fuse.rst)."""
    connection = (mountpoint.device_of(where) or "0:none").partition(":")[2]
    return Path("/sys/fs/fuse/connections", connection, "waiting")


async def _start_control(answers: Answers, config: Config, nursery: trio.Nursery) -> None:
    from lazyimg.control.server import serve_control

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await serve_control(
            answers,
            config.control,
            mode=int(config.control_mode, 8),
            group=config.control_group,
            task_status=task_status,
        )

    await nursery.start(serve)


async def _serve_metrics(answers: Answers, listen: str) -> None:
    from lazyimg.control.metricspage import serve_metrics
    from lazyimg.metrics import CONTENT_TYPE, render

    host, port = host_and_port(listen)
    await serve_metrics(lambda: render(answers.status()), host, port, CONTENT_TYPE)


async def _unmount_on_signals(where: Path) -> None:
    """On SIGTERM or SIGINT unmount; if that is busy, say who holds it and go on serving."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            try:
                await trio.to_thread.run_sync(mountpoint.umount, where)
            except InUse as exc:
                logger.warning("still serving: %s", exc)
            except LazyImgError as exc:
                logger.error("%s", exc)


async def _commit_now_and_then(catalog: Catalog) -> None:
    while True:
        await trio.sleep(COMMIT_INTERVAL_S)
        await _commit(catalog)


async def _commit(catalog: Catalog) -> None:
    for image in catalog.open_images():
        if image.is_dirty:
            await image.commit()


async def _again_after_faults(task: Callable[..., Awaitable[None]], *args: object) -> None:
    """Run a task for ever: no fault of ours ends the mount (I6)."""
    while True:
        try:
            await task(*args)
        except Exception:
            logger.exception("%s failed in an unforeseen way; starting it again", task.__name__)
        await trio.sleep(RESTART_PAUSE_S)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
