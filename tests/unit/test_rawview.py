"""A qcow2 source read as the guest's bytes, on a Glance in memory: what is asked, what is kept, what is believed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import image_fakes
import pytest
import trio
from image_fakes import ImageRig, Reader, wait_until
from qcow2_writer import Geometry, Image, Kind, write_image
from rawview_rig import add_qcow2, broken, held, lie, open_again, open_raw, raw_maker, view_of
from trio.testing import wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.fetchplan import Piece
from lazyimg.core.qcow2 import parse_header
from lazyimg.errors import GlanceUnavailable, SourceDamaged
from lazyimg.image import arrivals
from lazyimg.image.rawview import Qcow2View
from lazyimg.image.view import View

MIB = 1 << 20


def image(cluster_bits: int, guest: dict[int, Kind], clusters: int, **geometry: object) -> Image:
    size_bytes = clusters << cluster_bits
    return write_image(Geometry(3, cluster_bits, size_bytes, **geometry), guest, seed=7)  # type: ignore[arg-type]


def small() -> Image:
    """Chunks of 16 clusters of 4 KiB, of every kind."""
    kinds: list[Kind] = ["data", "compressed", "zero", "data", "zero allocated"]
    return image(12, {i: kinds[i % 5] for i in range(64)}, 80)


def big() -> Image:
    """Compressed clusters of 2 MiB, in little source."""
    return image(21, dict.fromkeys(range(3), "compressed"), 3)


# ── what is asked ──


async def test_reads_as_written(rig: ImageRig) -> None:
    """Clusters smaller than a chunk, of every kind in one chunk, read as they were written, and so once stored."""
    one = small()
    size_bytes = one.geometry.virtual_size_bytes
    opened = await open_raw(rig, 1, one.source)
    assert await opened.read(0, size_bytes) == one.read(0, size_bytes)
    assert not view_of(opened).half_complete
    await wait_all_tasks_blocked()
    await opened.fetcher.wait_written()
    assert opened.is_whole
    await opened.commit()
    rig.glance.always.error = AssertionError("all of it is here")
    again = await open_again(rig, opened.record)
    assert await again.read(0, size_bytes) == one.read(0, size_bytes)


async def test_readers_of_one_large_cluster_share_one_request(rig: ImageRig, nursery: trio.Nursery) -> None:
    """[I3] Whatever chunks of a compressed 2 MiB cluster are read, its bytes are asked for once."""
    one = big()
    opened = await open_raw(rig, 1, one.source)
    await opened.read(2 * 2 * MIB, 1)
    del rig.glance.ranges[:]
    gate = rig.glance.always.gate = trio.Event()
    readers = [Reader(nursery, opened.fetcher, chunk) for chunk in range(32)]
    await wait_all_tasks_blocked()
    gate.set()
    await wait_until(lambda: all(reader.ended_at for reader in readers))
    for chunk, reader in enumerate(readers):
        assert reader.got == {chunk: one.read(chunk * CHUNK, (chunk + 1) * CHUNK)}
    assert len(rig.glance.ranges) == 1


async def test_zeros_cost_no_request(rig: ImageRig) -> None:
    """Zero and unallocated clusters are present as holes, with Glance down and after a restart too."""
    one = image(16, {0: "data", 1: "zero", 2: "zero allocated"}, 40)
    opened = await open_raw(rig, 1, one.source)
    rig.glance.always.error = GlanceUnavailable("down")
    assert await opened.read(CHUNK, 39 * CHUNK) == bytes(39 * CHUNK)
    assert rig.glance.ranges == []
    again = await open_again(rig, opened.record)
    assert await again.read(20 * CHUNK, 20 * CHUNK) == bytes(20 * CHUNK)


async def test_tables_behind_the_head_are_kept(rig: ImageRig) -> None:
    """Tables that lie farther in are fetched once, by one request each, and after a restart not again."""
    one = image(16, {0: "data", 8191: "data", 8192: "data"} | dict.fromkeys(range(1, 40), "data"), 2 * 8192)
    behind = [start for start in one.table_starts if start >= MIB]
    assert behind, "with this seed a table lies behind the head"
    opened = await open_raw(rig, 1, one.source)
    for at in (CHUNK * 4000, CHUNK * 9000):
        assert await opened.read(at, 10) == bytes(10)
    assert sorted(rig.glance.ranges) == [(start, start + CHUNK) for start in sorted(behind)]
    key = opened.record.key("raw")
    for start in behind:
        await wait_until(lambda start=start: rig.cache.index.table(key, start, start + CHUNK))
    rig.glance.always.error = GlanceUnavailable("down")
    again = await open_again(rig, opened.record)
    for at in (CHUNK * 5000, CHUNK * 9500):
        assert await again.read(at, 10) == bytes(10)


async def test_neighbours_in_the_source_go_by_one_request(rig: ImageRig) -> None:
    """Compressed clusters that lie one behind the other, within shared sectors, are one request."""
    one = image(16, dict.fromkeys(range(10), "compressed"), 10)
    opened = await open_raw(rig, 1, one.source)
    assert await opened.read(0, 10 * CHUNK) == one.read(0, 10 * CHUNK)
    (table_start,) = one.table_starts
    data_ranges = [found for found in rig.glance.ranges if found[0] != table_start]
    assert len(data_ranges) == 1


async def test_disk_of_no_bytes(rig: ImageRig) -> None:
    """A disk without a byte is read without a table."""
    source = write_image(Geometry(3, 16, 0), {}, seed=1).source
    opened = await open_raw(rig, 1, source)
    assert await opened.read(0, 100) == b""


# ── who decodes ──


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, bool]]]:
    """What was decoded together: where each cluster begins in the disk, and whether the event loop was held for it.

    A body comes in one piece.
    """
    monkeypatch.setattr(image_fakes, "BODY_STEP_BYTES", 8 * MIB)
    done: list[list[tuple[int, bool]]] = []

    def decode_each(view: View, batch: Sequence[tuple[Piece, bytes]]) -> object:
        is_on_loop = threading.current_thread() is threading.main_thread()
        done.append([(piece.presented_start, is_on_loop) for piece, _ in batch if piece.is_compressed])
        return decode(view, batch)

    decode = arrivals._decode_each
    monkeypatch.setattr(arrivals, "_decode_each", decode_each)
    return done


async def test_cluster_a_reader_waits_for_is_decoded_first(
    rig: ImageRig, nursery: trio.Nursery, decodings: list[list[tuple[int, bool]]]
) -> None:
    """One cluster that a reader waits for is decoded at once; others that came with it in a thread, together."""
    one = image(16, dict.fromkeys(range(4), "compressed"), 4)
    opened = await open_raw(rig, 1, one.source)
    await opened.fetcher.fetch([0])
    del decodings[:]
    gate = rig.glance.always.gate = trio.Event()
    opened.fetcher.want_background([1, 2])
    reader = Reader(nursery, opened.fetcher, 3)
    await wait_all_tasks_blocked()
    gate.set()
    await wait_until(lambda: reader.ended_at and opened.fetcher.is_idle)
    assert [batch for batch in decodings if batch] == [
        [(3 * CHUNK, True)],
        [(1 * CHUNK, False), (2 * CHUNK, False)],
    ]
    assert reader.got == {3: one.read(3 * CHUNK, 4 * CHUNK)}
    assert await opened.read(CHUNK, 2 * CHUNK) == one.read(CHUNK, 3 * CHUNK)


async def test_what_is_decoded_at_once_is_bounded(
    rig: ImageRig, decodings: list[list[tuple[int, bool]]]
) -> None:
    """[I5] However much a few bytes of the source hold, one hop to a thread decodes a MiB, or one cluster."""
    size_bytes = 24 * CHUNK
    one = image(16, dict.fromkeys(range(24), "compressed"), 24)
    opened = await open_raw(rig, 1, one.source, request_bytes_max=8 * MIB)
    assert await opened.read(0, size_bytes) == one.read(0, size_bytes)
    assert [len(batch) for batch in decodings if batch] == [1, 16, 7]
    one = big()
    del decodings[:]
    opened = await open_raw(rig, 2, one.source, request_bytes_max=8 * MIB)
    assert await opened.read(0, 6 * MIB) == one.read(0, 6 * MIB)
    assert [len(batch) for batch in decodings if batch] == [1, 1, 1]
    assert not any(is_on_loop for batch in decodings for _, is_on_loop in batch)


# ── who leaves harms nobody ──


async def test_one_who_leaves_takes_no_piece_from_others(rig: ImageRig, nursery: trio.Nursery) -> None:
    """A piece that waits for its turn is kept for whoever else reads from its cluster."""
    one = big()
    opened = await open_raw(rig, 1, one.source)
    await opened.read(2 * 2 * MIB, 1)
    for _ in range(4):
        rig.slots.take_nowait(urgent=True, when_free=lambda: None)
    leaves = Reader(nursery, opened.fetcher, 0)
    stays = Reader(nursery, opened.fetcher, 1)
    await wait_all_tasks_blocked()
    leaves.scope.cancel()
    await wait_all_tasks_blocked()
    for _ in range(4):
        rig.slots.give_back(urgent=True)
    await wait_until(lambda: stays.ended_at)
    assert stays.got == {1: one.read(CHUNK, 2 * CHUNK)}


async def test_half_complete_chunks_are_let_go(rig: ImageRig, nursery: trio.Nursery) -> None:
    """A chunk of which some pieces came is not kept when nobody waits for the rest."""
    one = small()
    opened = await open_raw(rig, 1, one.source)
    rig.glance.always = held()
    reader = Reader(nursery, opened.fetcher, 0, 1)
    await wait_until(lambda: set(view_of(opened).half_complete) == {0, 1})
    await wait_all_tasks_blocked()
    reader.scope.cancel()
    assert rig.glance.always.gate is not None
    rig.glance.always.gate.set()
    await wait_until(lambda: opened.fetcher.is_idle)
    assert not view_of(opened).half_complete
    assert await opened.read(0, 2 * CHUNK) == one.read(0, 2 * CHUNK)


async def test_broken_flights_are_made_up_for(rig: ImageRig, expected_warnings: Callable[..., None]) -> None:
    """Bodies that break off lose only the pieces that did not come."""
    expected_warnings("trying again", required=False)
    one = small()
    opened = await open_raw(rig, 1, one.source, request_bytes_max=64 << 10)
    rig.glance.replies.extend(broken(length) for length in (0, 5000, 20_000, 4096, 4097))
    size_bytes = one.geometry.virtual_size_bytes
    assert await opened.read(0, size_bytes) == one.read(0, size_bytes)
    assert not view_of(opened).half_complete


# ── damage ──


def damaged_cluster(one: Image) -> dict[int, bytes]:
    """Return what makes the first compressed cluster undecodable."""
    start, _ = one.compressed[0]
    return {start: b"\xff" * 4}


@pytest.mark.parametrize("cluster_bits", [12, 16, 21])
async def test_cluster_damaged_once_is_asked_again(rig: ImageRig, cluster_bits: int) -> None:
    """Bytes that cannot be decoded may be a lie of the network: they are fetched once more before they are believed."""
    one = image(cluster_bits, dict.fromkeys(range(3), "compressed"), 3)
    opened = await open_raw(rig, 1, one.source)
    lie(rig, damaged_cluster(one), times=1)
    size_bytes = 3 << cluster_bits
    assert await opened.read(0, size_bytes) == one.read(0, size_bytes)


async def test_cluster_damaged_for_good_fails_its_readers_alone(rig: ImageRig) -> None:
    """What comes damaged again and again is an error, after a bounded number of requests; the rest reads on."""
    one = image(16, dict.fromkeys(range(3), "compressed"), 3)
    opened = await open_raw(rig, 1, one.source)
    lie(rig, damaged_cluster(one), times=1000)
    with pytest.raises(SourceDamaged):
        await opened.read(0, 10)
    # Twice by the tables that were here, twice by those that were fetched anew.
    start, _ = one.compressed[0]
    assert sum(first <= start < last for first, last in rig.glance.ranges) <= 4
    assert await opened.read(CHUNK, CHUNK) == one.read(CHUNK, 2 * CHUNK)
    assert not view_of(opened).half_complete
    del rig.glance.ranges[:]
    with pytest.raises(SourceDamaged):
        await opened.read(0, 10)
    assert len(rig.glance.ranges) <= 2


async def test_part_damaged_for_good_leaks_nothing(rig: ImageRig) -> None:
    """A chunk of many pieces one of which is damaged is not kept half complete."""
    one = small()
    opened = await open_raw(rig, 1, one.source, request_bytes_max=8 << 10)
    lie(rig, damaged_cluster(one), times=1000)
    with pytest.raises(SourceDamaged):
        await opened.read(0, 10)
    await wait_until(lambda: opened.fetcher.is_idle)
    assert not view_of(opened).half_complete


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("is_l1", [False, True])
async def test_table_that_does_not_fit_is_asked_again(rig: ImageRig, times: int, is_l1: bool) -> None:
    """A bad entry costs its table a second request, and only then whoever reads there an error."""
    one = image(16, {0: "data", 1: "data", 8192: "data"}, 8193)
    at = one.l1_start if is_l1 else one.table_starts[0]
    record = add_qcow2(rig, 1, one.source)
    # The tables as they came with the head are bad; what comes from Glance is good, or bad again.
    head = bytearray(one.source[:MIB])
    head[at : at + 8] = b"\x3f" * 8
    lie(rig, {at: b"\x3f" * 8}, times=times - 1)
    opened = await open_again(rig, record, bytes(head))
    if times == 1:
        assert await opened.read(0, 10) == one.read(0, 10)
        key = record.key("raw")
        table = (at, at + (8 * one.l1_entries if is_l1 else CHUNK))
        good = one.source[slice(*table)]
        await wait_until(lambda: rig.cache.index.table(key, *table) == good)
        again = await open_again(rig, record)
        del rig.glance.ranges[:]
        assert await again.read(CHUNK, 10) == one.read(CHUNK, CHUNK + 10)
        assert len(rig.glance.ranges) == 1, "only data: the good table was kept"
    else:
        with pytest.raises(SourceDamaged):
            await opened.read(0, 10)
        del rig.glance.ranges[:]
        with pytest.raises(SourceDamaged):
            await opened.read(0, 10)
        assert rig.glance.ranges == []
    assert await opened.read(8192 * CHUNK, 10) == one.read(8192 * CHUNK, 8192 * CHUNK + 10)


# ── the head ──


async def test_head_that_is_lost_is_fetched(rig: ImageRig) -> None:
    """An image whose header is not in the cache any more opens all the same, and keeps it then."""
    one = small()
    record = add_qcow2(rig, 1, one.source)
    opened = await open_again(rig, record)
    assert rig.glance.ranges == [(0, len(one.source))]
    assert await opened.read(0, CHUNK) == one.read(0, CHUNK)
    await wait_until(lambda: opened.fetcher.is_idle)
    del rig.glance.ranges[:]
    await open_again(rig, record)
    # What the read before wanted ahead may still come.
    assert (0, len(one.source)) not in rig.glance.ranges


async def test_head_comes_from_a_store_without_ranges_too(rig: ImageRig) -> None:
    """The head of a source that can only be streamed is its first MiB, and the stream ends there."""
    one = big()
    record = add_qcow2(rig, 1, one.source + bytes(4 * MIB))
    rig.glance.contents[record.id] = lambda start, stop: (one.source + bytes(4 * MIB))[start:stop]
    rig.glance.has_ranges = False
    assert await raw_maker(rig).read_head(record) == (one.source + bytes(4 * MIB))[:MIB]
    assert rig.glance.sent_bytes < 2 * MIB


# ── the view alone ──


def test_pieces_are_cut_alike_each_time() -> None:
    """What a chunk needs does not depend on what was planned before it, nor on what tables are known."""
    one = image(9, {i: "compressed" for i in range(0, 500, 3)}, 512)
    header = parse_header(one.source, len(one.source))

    def plans(order: list[int]) -> dict[int, list[object]]:
        view = Qcow2View(header, MIB)
        found: dict[int, list[object]] = {}
        for chunk in order:
            while missing := view.missing_tables([chunk]):
                for table in missing:
                    view.give_table(table, one.source[table.start : table.stop])
            found[chunk] = list(view.plan(chunk))
        return found

    assert plans([0, 1, 2, 3]) == plans([3, 1, 0, 2])
