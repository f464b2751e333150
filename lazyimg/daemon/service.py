"""The daemon: wires everything, bottom up, in one function, and ends it in order.

Started by the holder with what handover.py names, and after that the descriptors of the open upper files.  What a
read of present bytes does not need is imported once the mount answers.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path

import trio

from lazyimg.config import Config, host_and_port
from lazyimg.core.pace import Pace
from lazyimg.daemon import handshake, mountpoint
from lazyimg.daemon.answers import Answers
from lazyimg.daemon.cacheopening import CacheOpening
from lazyimg.daemon.dump import dump_on_signal
from lazyimg.daemon.fdstore import FdStore, receive_all, stored_file
from lazyimg.daemon.filesystem import Filesystem
from lazyimg.daemon.handles import Handles
from lazyimg.daemon.handover import FAILED, KEPT, PREPARED, Handover
from lazyimg.daemon.handshake import Resumption
from lazyimg.daemon.holderlink import HolderLink
from lazyimg.daemon.inflight import StuckRequests
from lazyimg.daemon.kernelpages import KernelPages
from lazyimg.daemon.lastentries import LastEntries
from lazyimg.daemon.lazyfiles import LazyFiles, parse_owner
from lazyimg.daemon.notify import notify
from lazyimg.daemon.session import Session
from lazyimg.daemon.spawn import ENDING_SIGNALS, listened_fds, take_signals
from lazyimg.daemon.upper import Upper
from lazyimg.errors import ConfigError, InUse, LazyImgError, RestartRefused
from lazyimg.glance.auth import make_auth
from lazyimg.glance.configured import make_glance
from lazyimg.image.brake import SlowStreams
from lazyimg.image.catalog import Catalog
from lazyimg.image.diskhealth import DiskHealth
from lazyimg.image.hydrator import Hydrator
from lazyimg.image.maker import FetchLimits, ImageMaker, Shared
from lazyimg.image.recordwatch import RecordWatch
from lazyimg.image.slots import ByteBudget, FlightSlots
from lazyimg.image.sourcecheck import Source, SourceCheck
from lazyimg.image.space import CacheSpace
from lazyimg.image.states import States
from lazyimg.image.unstored import Unstored
from lazyimg.image.viewchange import refuse_change
from lazyimg.logs import WINDOW_S, LimitedHandler, set_up_logging
from lazyimg.store.cachedir import CacheDir

logger = logging.getLogger("lazyimg.daemon")

# What was written becomes durable this often: a crash costs at most so much fetching again.
COMMIT_INTERVAL_S = 1
# Inode numbers and handles are functions of these.
FIXED_KEYS = ("cache_dir", "view")
# A task that failed in an unforeseen way is started again after this.
RESTART_PAUSE_S = 1


def main() -> int:
    """Run the daemon on the descriptors it was given; return the exit code."""
    fds = listened_fds()
    try:
        if not {*KEPT, "handover", "orders"} <= fds.keys():
            raise ConfigError("the daemon is started by `lazyimg mount`, not by hand")
        handover = Handover.from_memory(fds["handover"])
        os.close(fds["handover"])
        log = set_up_logging(handover.config.log_level)
        if handover.is_planned:
            handover = _prepared(handover)
        # Before the open files arrive: its descriptor has a small number then, which select(2) needs.
        resumption = Resumption(fds["fuse"], handover.init_request, handover.init_answer)
        orders = socket.socket(fileno=fds["orders"])
        stored = receive_all(orders)
        trio.run(_serve, handover, {name: fds[name] for name in KEPT}, resumption, orders, stored, log)
    except LazyImgError as exc:
        return _failed(exc)
    except EOFError:
        # The holder ended first: it has another daemon, or none.
        return 1
    except BaseExceptionGroup as group:
        ours, others = group.split(LazyImgError)
        if ours is None or others is not None:
            raise
        return _failed(_first_of(ours))
    return 0


def _prepared(handover: Handover) -> Handover:
    """Return what to serve with once the last daemon has ended, and tell the holder; raise what is against it."""
    config = handover.source.load()
    for key in FIXED_KEYS:
        if getattr(config, key) != getattr(handover.config, key):
            raise RestartRefused(f"config key {key!r} cannot change while mounted; unmount and mount again")
    answer = handshake.libfuse_answer(handover.init_request)
    # Another release of lazyimg may have had other limits; those the kernel was told go on.
    if handshake.amended(answer) != handshake.amended(handover.init_answer):
        raise RestartRefused("this libfuse answers the kernel otherwise; unmount and mount again")
    CacheDir.check(config.cache_dir)
    notify(f"{PREPARED}={config.model_dump_json()}")
    return replace(handover, config=config)


def _failed(exc: LazyImgError) -> int:
    print(f"lazyimg: {exc}", file=sys.stderr)
    notify(f"{FAILED}={' '.join(str(exc).split())}")
    return exc.exit_code


def _first_of(group: BaseExceptionGroup[LazyImgError]) -> LazyImgError:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first


async def _serve(
    handover: Handover,
    fds: Mapping[str, int],
    resumption: Resumption,
    orders: socket.socket,
    stored: Mapping[str, int],
    log: LimitedHandler,
) -> None:
    """Serve the mount until it is unmounted, or another daemon shall have it."""
    config = handover.config
    handles, last = Handles(fds["handles"]), LastEntries(fds["handles"])
    opening = CacheOpening(config, last, handles, is_last_dying=handover.is_last_dying)
    disk = opening.disk
    async with disk.watched():
        cache = await opening.open()
    try:
        refuse_change(cache.index.entries(), config.view)
        glance = make_glance(config, make_auth(config))
        # What hydration fetches, what it is compared with, and what streams bring for nobody are paid for together.
        pace = Pace(config.hydrate_rate)
        shared = _make_shared(config, disk, pace)
        space = CacheSpace(
            cache,
            disk,
            shared.cache_writes,
            size_max_bytes=config.cache_size_max,
            free_min_bytes=config.cache_free_min,
        )
        store = FdStore(stored)
        session = Session(resumption, tasks_max=config.tasks_max, drain_timeout_s=config.restart_timeout)
        link = HolderLink(orders, handover, fds, store, session)
        async with disk.watched(), trio.open_nursery() as nursery:
            watch = RecordWatch(glance)
            pages = KernelPages(nursery)
            maker = ImageMaker(
                glance,
                space,
                cache.spools.open,
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
                forget_pages=pages.forget_nowait,
                has_news=watch.wake,
            )
            limiter = trio.CapacityLimiter(config.cache_write_threads)
            states = States(cache.index, disk, limiter, last.keep)
            last.keep(states.all())
            catalog = Catalog(
                glance,
                cache,
                states,
                maker,
                nursery,
                disk,
                limiter,
                view=config.view,
                lookup_timeout_s=config.lookup_timeout,
                negative_ttl_s=config.negative_ttl,
                handles=handles.all(),
                open_files_max=config.open_files_max,
            )
            await nursery.start(space.keep_room, catalog.busy_keys, catalog.try_evict)
            nursery.start_soon(_again_after_faults, _commit_now_and_then, catalog)
            nursery.start_soon(_again_after_faults, glance.keep_probing)
            nursery.start_soon(_unmount_on_signals, handover.mountpoint)
            upper = Upper(fds["upper"], handles, store)
            found = (stored_file(name, fd) for name, fd in stored.items())
            upper.files.take_over(one for one in found if one is not None)
            owner = None if config.image_owner is None else parse_owner(config.image_owner)
            lazy = LazyFiles(
                catalog,
                int(config.image_mode, 8),
                lambda: owner or upper.owner,
                handles,
                mtime_shift_ns=pages.mtime_shift_ns,
            )

            def make_filesystem(after_answers: trio.Nursery) -> Filesystem:
                limiter = trio.CapacityLimiter(config.upper_threads)
                return Filesystem(lazy, upper, limiter, resumption.take_over, after_answers, handles)

            filesystem: Filesystem = await nursery.start(
                _serve_fuse, session, make_filesystem, nursery.cancel_scope
            )
            nursery.start_soon(_again_after_faults, link.listen)
            nursery.start_soon(_again_after_faults, opening.return_when_back, link)
            nursery.start_soon(filesystem.lost_opens.look_into_all)
            # From here on the kernel can be told to forget what one of these finds wrong.
            nursery.start_soon(_again_after_faults, watch.run, catalog)
            source = Source(glance, shared.slots, pace) if config.hydrate else None
            check = SourceCheck(catalog, disk, trio.CapacityLimiter(1), source, bytes_per_s=config.hash_rate)
            nursery.start_soon(_again_after_faults, check.run)
            if config.hydrate:
                hydrator = Hydrator(catalog, space, disk, pace, delay_s=config.hydrate_delay)
                nursery.start_soon(_again_after_faults, hydrator.run)
            stuck = StuckRequests(_waiting_path(handover.mountpoint), fds["fuse"], filesystem.in_flight)
            nursery.start_soon(_again_after_faults, stuck.watch)
            nursery.start_soon(_again_after_faults, dump_on_signal, filesystem.in_flight)
            nursery.start_soon(_again_after_faults, _tell_left_out, log)
            answers = Answers(
                glance,
                catalog,
                cache,
                space,
                filesystem.in_flight,
                stuck,
                disk,
                nursery,
                link,
                mountpoint=handover.mountpoint,
                view=config.view,
            )
            await _start_control(answers, config, nursery, is_replaced=handover.is_last_dying)
            if config.metrics_listen is not None:
                nursery.start_soon(_again_after_faults, _serve_metrics, answers, config.metrics_listen)
            notify("READY=1")
            logger.info("serving %s", handover.mountpoint)
        async with disk.watched():
            await _commit(catalog)
            is_hanging = not await disk.still_answers()
        if not session.is_left:
            notify("STOPPING=1")
            with trio.move_on_after(RESTART_PAUSE_S):
                await glance.aclose()
        if is_hanging:
            logger.warning("the cache disk hangs: ending without closing the cache")
            opening.remove_stand_in()
            # Whatever closes a file there, and be it the interpreter's own end, would wait for the disk.
            os._exit(0)
    finally:
        cache.close()
        opening.remove_stand_in()


def _make_shared(config: Config, disk: DiskHealth, pace: Pace) -> Shared:
    return Shared(
        FlightSlots(config.requests_max, config.background_requests_max),
        SlowStreams(pace, disk),
        ByteBudget(config.write_buffer_max),
        Unstored(),
        disk,
        trio.CapacityLimiter(config.cache_read_threads),
        trio.CapacityLimiter(config.cache_write_threads),
        trio.CapacityLimiter(1),
        trio.CapacityLimiter(config.decode_threads),
    )


async def _serve_fuse(
    session: Session,
    make_filesystem: Callable[[trio.Nursery], Filesystem],
    scope: trio.CancelScope,
    *,
    task_status: trio.TaskStatus[Filesystem],
) -> None:
    """Answer the kernel until the mount is gone or left, then end everything else."""
    try:
        await session.serve(make_filesystem, task_status=task_status)
    finally:
        scope.cancel()


def _waiting_path(where: Path) -> Path:
    """Return where the kernel says how many requests of this mount wait (Documentation/filesystems/fuse.rst)."""
    connection = (mountpoint.device_of(where) or "0:none").partition(":")[2]
    return Path("/sys/fs/fuse/connections", connection, "waiting")


async def _start_control(
    answers: Answers, config: Config, nursery: trio.Nursery, *, is_replaced: bool
) -> None:
    from lazyimg.control.server import serve_control

    async def serve(*, task_status: trio.TaskStatus[None]) -> None:
        await serve_control(
            answers,
            config.control,
            mode=int(config.control_mode, 8),
            group=config.control_group,
            is_replaced=is_replaced,
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
    for number in ENDING_SIGNALS:
        # What the receiver has not told when it ends is sent once more: the mount is gone then, as was asked.
        # Not SIG_IGN: that would drop what waits to be taken.
        signal.signal(number, lambda _number, _frame: None)
    with trio.open_signal_receiver(*ENDING_SIGNALS) as signals:
        take_signals(*ENDING_SIGNALS)
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
    await catalog.tidy()


async def _tell_left_out(log: LimitedHandler) -> None:
    """A storm that has ended is told of too, when nothing else is."""
    while True:
        await trio.sleep(WINDOW_S)
        log.tell_left_out()


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
