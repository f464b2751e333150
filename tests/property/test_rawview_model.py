"""The raw view held to a model: pieces that come in any order, or not at all, and readers that leave."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from image_fakes import ImageRig, Reader, Reply
from qcow2_writer import Geometry, Image, Kind, write_image
from rawview_rig import broken, open_raw, view_of
from trio.testing import MockClock

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_count, chunk_range
from lazyimg.core.fetchplan import Piece
from lazyimg.core.qcow2 import parse_header
from lazyimg.errors import GlanceUnavailable
from lazyimg.image.rawview import Qcow2View
from lazyimg.store.cachedir import CacheDir

MIB = 1 << 20
SETTLE_TIMEOUT_S = 30


@st.composite
def images(draw: st.DrawFn) -> Image:
    """Images of three to six chunks, in clusters smaller than a chunk, as large, and larger."""
    has_subclusters = draw(st.booleans())
    cluster_bits = draw(st.sampled_from((14, 17) if has_subclusters else (9, 12, 15, 16, 18)))
    size_bytes = draw(st.integers(3 * CHUNK // 512, 6 * CHUNK // 512)) * 512
    geometry = Geometry(3, cluster_bits, size_bytes, has_subclusters)
    guest: dict[int, Kind] = {}
    for _ in range(draw(st.integers(1, 6))):
        first = draw(st.integers(0, geometry.clusters - 1))
        kinds = draw(st.lists(st.sampled_from(geometry.kinds), min_size=1, max_size=20))
        guest |= {i: kind for i, kind in enumerate(kinds, first) if i < geometry.clusters}
    return write_image(geometry, guest, draw(st.integers(0, 1 << 16)))


def view_with_tables(image: Image) -> Qcow2View:
    view = Qcow2View(parse_header(image.source, len(image.source)), MIB)
    chunks = range(chunk_count(view.size_bytes))
    while missing := view.missing_tables(chunks):
        for table in missing:
            view.give_table(table, image.source[table.start : table.stop])
    return view


@given(images(), st.data())
def test_pieces_complete_chunks_in_any_order(image: Image, data: st.DataObject) -> None:
    """A chunk is complete with the last of its pieces, never before, and is then what was written."""
    view = view_with_tables(image)
    chunks = st.integers(0, chunk_count(view.size_bytes) - 1)
    needed: dict[int, set[Piece]] = {}
    known: dict[Piece, None] = {}
    for _ in range(data.draw(st.integers(1, 40))):
        step = data.draw(st.sampled_from(("plan", "arrive", "arrive", "forget")))
        if step == "plan":
            chunk = data.draw(chunks)
            pieces = view.plan(chunk)
            known |= dict.fromkeys(pieces)
            start, stop = chunk_range(chunk, view.size_bytes)
            if chunk in needed:
                assert set(pieces) == needed[chunk]
            elif not pieces:
                assert image.read(start, stop) == bytes(stop - start)
            elif len(pieces) > 1 or not _covers(pieces[0], start, stop):
                needed[chunk] = set(pieces)
        elif step == "forget":
            chunk = data.draw(chunks)
            view.forget(chunk)
            needed.pop(chunk, None)
        elif known:
            piece = data.draw(st.sampled_from(list(known)))
            found = dict(view.assemble(piece, view.decode(piece, image.source[piece.start : piece.stop])))
            for chunk, content in found.items():
                start, stop = chunk_range(chunk, view.size_bytes)
                assert content == image.read(start, stop)
                assert needed.pop(chunk, {piece}) == {piece} or _covers(piece, start, stop)
            for missing in needed.values():
                missing.discard(piece)
            assert all(needed.values()), "complete and not handed out"
        assert set(view.half_complete) == set(needed)


def _covers(piece: Piece, start: int, stop: int) -> bool:
    return piece.presented_start <= start and stop <= piece.presented_stop


# ── through the fetcher ──

QEMU_OPTIONS = (
    "cluster_size=512",
    "cluster_size=4k,compat=0.10",
    "cluster_size=2M",
    "extended_l2=on",
)


@cache
def qemu_made(options: str, *, compressed: bool) -> tuple[bytes, bytes]:
    """Return a source that qemu-img made, and the raw disk it made it of."""
    geometry = Geometry(virtual_size_bytes=8 * CHUNK)
    disk = write_image(geometry, dict.fromkeys(range(100, 700, 3), "data"), seed=9).read(0, 8 * CHUNK)
    disk = disk.ljust(40 * CHUNK, b"\0") + b"end".ljust(512, b"\7")
    with tempfile.TemporaryDirectory() as folder:
        raw, source = Path(folder, "raw"), Path(folder, "source")
        raw.write_bytes(disk)
        command = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", options]
        subprocess.run([*command, *["-c"] * compressed, raw, source], check=True)
        return source.read_bytes(), disk


@st.composite
def sources(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A source and what it must read as: qemu's, or one whose pieces lie in any order."""
    if draw(st.booleans()):
        return qemu_made(draw(st.sampled_from(QEMU_OPTIONS)), compressed=draw(st.booleans()))
    image = draw(images())
    return image.source, image.read(0, image.geometry.virtual_size_bytes)


REPLIES = st.one_of(
    st.builds(Reply),
    st.builds(broken, st.integers(0, 100_000)),
    st.builds(lambda: Reply(error=GlanceUnavailable("down"))),
)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(sources(), st.data())
def test_random_reads_with_faults_read_as_the_disk(source: tuple[bytes, bytes], data: st.DataObject) -> None:
    """Whatever breaks and whoever leaves, who stays reads the disk, and nothing half complete is kept."""
    content, disk = source
    chunks = st.lists(st.integers(0, chunk_count(len(disk)) - 1), min_size=1, max_size=8, unique=True)
    reads = data.draw(st.lists(st.tuples(chunks, st.booleans()), min_size=1, max_size=6))
    replies = data.draw(st.lists(REPLIES, max_size=6))
    steps = data.draw(st.integers(0, 20))

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            cache_dir = CacheDir(Path(folder))
            async with trio.open_nursery() as nursery:
                rig = ImageRig(cache_dir, nursery)
                image = await open_raw(rig, 1, content, request_bytes_max=CHUNK)
                rig.glance.replies.extend(replies)
                readers = [Reader(nursery, image.fetcher, *sorted(wanted)) for wanted, _ in reads]
                for _ in range(steps):
                    await trio.lowlevel.checkpoint()
                for reader, (_, leaves) in zip(readers, reads, strict=True):
                    if leaves:
                        reader.scope.cancel()
                await settled(lambda: all(map(has_ended, readers)))
                for reader, (wanted, leaves) in zip(readers, reads, strict=True):
                    if reader.got is None:
                        assert leaves, reader.error
                    else:
                        expected = {n: disk[slice(*chunk_range(n, len(disk)))] for n in wanted}
                        assert reader.got == expected
                await settled(lambda: image.fetcher.is_idle)
                assert not view_of(image).half_complete
                nursery.cancel_scope.cancel()
            cache_dir.close()

    # Pauses between attempts pass quickly; threads need real time.
    trio.run(run, clock=MockClock(rate=20))


def has_ended(reader: Reader) -> bool:
    return reader.ended_at is not None or reader.scope.cancelled_caught


async def settled(condition: Callable[[], bool]) -> None:
    """Return when the condition holds."""
    with trio.fail_after(SETTLE_TIMEOUT_S * 20):
        while not condition():  # noqa: ASYNC110  what a thread has done sets no event
            await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def _prepared(require: Callable[..., None], expected_warnings: Callable[..., None]) -> None:
    require("qemu-img")
    expected_warnings("trying again", required=False)
