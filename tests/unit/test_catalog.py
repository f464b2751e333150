"""Which names stand for which images: known ones at once, others decided once, in the background, in time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
from image_fakes import ImageRig, Reply
from store_images import content
from trio.testing import MockClock, wait_all_tasks_blocked

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.identity import BASE_NAME_OF_NOTHING, base_name
from lazyimg.errors import (
    GlanceUnavailable,
    ImageForbidden,
    ImageRefused,
    LookupUndecided,
)
from lazyimg.image.catalog import Catalog
from lazyimg.image.decisions import REST_S
from lazyimg.image.lazyimage import LazyImage
from lazyimg.store.entry import ImageEntry
from lazyimg.store.index import Index

# Threads run in real time, so the clock is moved by hand.
pytestmark = pytest.mark.usefixtures("mock_clock")

SIZE_BYTES = 3 * CHUNK + 7
DOWN = GlanceUnavailable("down")


class Task:
    """A call in a task of its own."""

    def __init__(self, nursery: trio.Nursery, call: Callable[[], Awaitable[LazyImage | None]]) -> None:
        self.result: LazyImage | None = None
        self.error: Exception | None = None
        self.ended = trio.Event()
        self.scope = trio.CancelScope()
        nursery.start_soon(self._run, call)

    async def _run(self, call: Callable[[], Awaitable[LazyImage | None]]) -> None:
        with self.scope:
            try:
                self.result = await call()
            except Exception as exc:
                self.error = exc
        self.ended.set()


async def found(catalog: Catalog, name: str) -> LazyImage:
    image = await catalog.lookup(name)
    assert image is not None
    return image


# ── names ──


async def test_base_name_and_id_lead_to_one_image(rig: ImageRig, catalog: Catalog) -> None:
    """Looked up by sha1(id) or by id, it is the same image, with the bytes and inode number of its identity."""
    record = rig.glance.add(1, SIZE_BYTES)
    image = await found(catalog, record.base_name)
    assert await found(catalog, record.id) is image
    assert image.inode == record.inode("stored")
    assert catalog.key_of_inode(image.inode) == record.key("stored")
    assert await image.read(0, SIZE_BYTES) == content(1, 0, SIZE_BYTES)


async def test_link_of_an_id_leads_to_the_base_name(rig: ImageRig, catalog: Catalog) -> None:
    """The link has an inode number of its own, and points to the name beside it."""
    record = rig.glance.add(1, SIZE_BYTES)
    image = await found(catalog, record.id)
    inode = catalog.link_inode(image)
    assert inode != image.inode
    assert catalog.link_target(inode) == record.base_name
    assert catalog.link_target(image.inode) is None


async def test_known_name_never_asks_glance(rig: ImageRig, catalog: Catalog) -> None:
    """[I6] Once published a name is answered with no call to Glance, also by the next daemon with Glance down."""
    record = rig.glance.add(1, SIZE_BYTES)
    await found(catalog, record.base_name)
    rig.glance.image_error = rig.glance.list_error = DOWN
    rig.glance.image_calls.clear()
    for _ in range(3):
        await found(catalog, record.base_name)
        await found(catalog, record.id)
    rig.cache.close_image(record.key("stored"))
    assert await found(rig.catalog(), record.base_name)
    assert (rig.glance.image_calls, rig.glance.list_calls) == ([], 1)


async def test_name_that_is_not_listed_asks_again(rig: ImageRig, catalog: Catalog) -> None:
    """An image uploaded a moment ago is found at once, however fresh the list of images is."""
    first = rig.glance.add(1, SIZE_BYTES)
    await found(catalog, first.base_name)
    second = rig.glance.add(2, SIZE_BYTES)
    assert (await found(catalog, second.base_name)).record == second
    assert rig.glance.list_calls == 2


async def test_miss_is_believed_for_a_while(rig: ImageRig, catalog: Catalog, mock_clock: MockClock) -> None:
    """A name nobody has is kept `negative_ttl`, so that its asking again and again costs Glance little."""
    record = rig.glance.add(1, SIZE_BYTES)
    del rig.glance.records[record.id]
    for _ in range(3):
        assert await catalog.lookup(record.base_name) is None
    assert rig.glance.list_calls == 1
    rig.glance.records[record.id] = record
    assert await catalog.lookup(record.base_name) is None
    mock_clock.jump(2.1)
    assert (await found(catalog, record.base_name)).record == record


async def test_name_of_nothing_is_never_asked(rig: ImageRig, catalog: Catalog) -> None:
    """Nova looks up sha1("") at each pass of its cache manager; no image has that id."""
    assert await catalog.lookup(BASE_NAME_OF_NOTHING) is None
    assert (rig.glance.image_calls, rig.glance.list_calls) == ([], 0)


async def test_lookups_of_one_name_share_one_decision(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery
) -> None:
    """However many ask, and by whichever way, an image is asked of Glance, judged and fetched once."""
    record = rig.glance.add(1, SIZE_BYTES)
    rig.glance.image_gate = gate = trio.Event()
    calls = [lambda: catalog.lookup(record.base_name)] * 5 + [lambda: catalog.lookup(record.id)] * 5
    tasks = [Task(nursery, call) for call in [*calls, lambda: catalog.find(record.id)]]
    await wait_all_tasks_blocked()
    gate.set()
    for task in tasks:
        await task.ended.wait()
    assert {task.result for task in tasks} == {await found(catalog, record.id)}
    assert len(rig.glance.image_calls) == 3
    assert rig.glance.ranges == [(0, SIZE_BYTES)]


async def test_one_list_answers_all_who_wait_for_it(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery
) -> None:
    """Many unknown names at once cost one list for those who asked before it, not one each."""
    tasks = [
        Task(nursery, lambda n=n: catalog.lookup(base_name(str(n))))  # type: ignore[misc]  # bound now
        for n in range(20)
    ]
    for task in tasks:
        await task.ended.wait()
    assert {task.result for task in tasks} == {None}
    assert rig.glance.list_calls <= 2


# ── in time ──


async def test_lookups_that_wait_at_once_share_one_limit(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """[I6] While Glance hangs, no lookup waits longer than the first's limit; the work goes on and is used."""
    records = [rig.glance.add(number, SIZE_BYTES) for number in (1, 2)]
    rig.glance.image_gate = gate = trio.Event()
    tasks = [Task(nursery, lambda: catalog.lookup(records[0].base_name))]
    await wait_all_tasks_blocked()
    mock_clock.jump(1)
    tasks.append(Task(nursery, lambda: catalog.lookup(records[1].base_name)))
    await wait_all_tasks_blocked()
    assert not any(task.ended.is_set() for task in tasks)
    mock_clock.jump(1.01)
    await wait_all_tasks_blocked()
    assert [type(task.error) for task in tasks] == [LookupUndecided] * 2
    assert len(rig.glance.image_calls) == 2
    gate.set()
    # For a moment after a limit ran out nobody waits.
    mock_clock.jump(REST_S)
    for record in records:
        assert (await found(catalog, record.base_name)).record == record
    assert len(rig.glance.image_calls) == 2


async def test_each_wait_has_a_limit_of_its_own_again(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery, mock_clock: MockClock
) -> None:
    """A limit that ran out, or whose only waiter was interrupted, does not shorten the next lookup's."""
    record = rig.glance.add(1, SIZE_BYTES)
    rig.glance.image_gate = trio.Event()
    interrupted = Task(nursery, lambda: catalog.lookup(record.base_name))
    await wait_all_tasks_blocked()
    interrupted.scope.cancel()
    for later in (100, 1.5):
        await wait_all_tasks_blocked()
        mock_clock.jump(later)
        task = Task(nursery, lambda: catalog.lookup(record.base_name))
        await wait_all_tasks_blocked()
        mock_clock.jump(1.9)
        await wait_all_tasks_blocked()
        assert not task.ended.is_set()
        mock_clock.jump(0.2)
        await task.ended.wait()
        assert isinstance(task.error, LookupUndecided)


async def test_glance_that_is_down_decides_nothing(rig: ImageRig, catalog: Catalog) -> None:
    """A passing fault is never taken for "no such image", and not remembered."""
    record = rig.glance.add(1, SIZE_BYTES)
    for fault in ("list_error", "image_error"):
        setattr(rig.glance, fault, DOWN)
        for name in (record.base_name, record.id):
            if fault == "image_error" or name == record.base_name:
                with pytest.raises(LookupUndecided, match="look it up again"):
                    await catalog.lookup(name)
        setattr(rig.glance, fault, None)
    assert (await found(catalog, record.base_name)).record == record


async def test_bug_in_a_decision_decides_nothing(
    rig: ImageRig, catalog: Catalog, expected_warnings: Callable[..., None]
) -> None:
    """[I6] An unforeseen exception is logged and answered as undecided; the next lookup tries again."""
    expected_warnings("failed in an unforeseen way")
    record = rig.glance.add(1, SIZE_BYTES)
    rig.glance.list_error = RuntimeError("a bug")
    with pytest.raises(LookupUndecided, match="internal error"):
        await catalog.lookup(record.base_name)
    rig.glance.list_error = None
    assert await catalog.lookup(record.base_name)


# ── what is not shown ──


@pytest.mark.parametrize(
    ("changes", "requests"),
    [({"disk_format": "vmdk"}, 0), ({"disk_format": "qcow2"}, 2), ({"container_format": "ova"}, 0)],
)
async def test_refused_image_has_no_name(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock, changes: dict[str, object], requests: int
) -> None:
    """[I8] A format that cannot be shown costs no bytes, content that is not its label's is fetched twice before that
    is believed; either is judged once and leaves nothing."""
    record = rig.glance.add(1, SIZE_BYTES, **changes)
    for _ in range(3):
        assert await catalog.lookup(record.base_name) is None
        mock_clock.jump(2.1)
    with pytest.raises(ImageRefused, match=record.id):
        await catalog.find(record.id)
    assert len(rig.glance.ranges) == requests
    assert [one.id for one, reason in catalog.refusals() if reason] == [record.id]
    assert rig.cache.index.entries() == []
    assert list((rig.cache.path / "chunks").iterdir()) == []


async def test_one_lie_hides_no_image(rig: ImageRig, catalog: Catalog) -> None:
    """[I8] First bytes that came wrong once are fetched again before they are believed."""
    record = rig.glance.add(1, SIZE_BYTES)
    honest = rig.glance.contents[record.id]

    def lie_once(start: int, stop: int) -> bytes:
        rig.glance.contents[record.id] = honest
        return b"QFI\xfb".ljust(stop - start, b"\0")

    rig.glance.contents[record.id] = lie_once
    found = await catalog.lookup(record.base_name)
    assert found is not None
    assert await found.read(0, 100) == content(1, 0, 100)
    assert catalog.refusals() == []


async def test_refusal_by_several_ways_at_once(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """[I8] Looked up by both names and found by id at once, an image is judged once and refused to all."""
    judged: list[str] = []
    put = Index.put

    def noting_put(index: Index, entry: ImageEntry) -> None:
        judged.append(entry.state)
        put(index, entry)

    monkeypatch.setattr(Index, "put", noting_put)
    record = rig.glance.add(1, SIZE_BYTES, disk_format="qcow2")
    rig.glance.image_gate = gate = trio.Event()
    by_hash = Task(nursery, lambda: catalog.lookup(record.base_name))
    by_id = Task(nursery, lambda: catalog.lookup(record.id))
    by_people = Task(nursery, lambda: catalog.find(record.id))
    await wait_all_tasks_blocked()
    gate.set()
    for task in (by_hash, by_id, by_people):
        await task.ended.wait()
        assert task.result is None
    assert (by_hash.error, by_id.error) == (None, None)
    assert isinstance(by_people.error, ImageRefused)
    assert judged == ["judging", "judging"]
    assert len(rig.glance.ranges) == 2
    assert list((rig.cache.path / "chunks").iterdir()) == []


@pytest.mark.parametrize("status", ["queued", "saving", "deactivated", "pending_delete"])
async def test_image_that_is_not_active_has_no_name_yet(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock, status: str
) -> None:
    """Only an active image is shown, and it is as soon as it becomes that."""
    record = rig.glance.add(1, SIZE_BYTES, status=status)
    assert await catalog.lookup(record.base_name) is None
    with pytest.raises(ImageRefused, match=f"status is {status}"):
        await catalog.find(record.id)
    rig.glance.records[record.id] = replace(record, status="active")
    mock_clock.jump(2.1)
    assert await found(catalog, record.base_name)
    assert catalog.refusals() == []


async def test_deleted_image_has_no_name(rig: ImageRig, catalog: Catalog) -> None:
    """An image that was listed and deleted before it was looked up is not there."""
    listed, other = rig.glance.add(1, SIZE_BYTES), rig.glance.add(2, SIZE_BYTES)
    await found(catalog, other.base_name)
    del rig.glance.records[listed.id]
    assert await catalog.lookup(listed.base_name) is None
    assert rig.glance.list_calls == 1


async def test_bytes_refused_for_a_while_are_not_a_verdict(
    rig: ImageRig, catalog: Catalog, mock_clock: MockClock
) -> None:
    """Credentials that could not read the image a moment ago do not hide it once they can."""
    record = rig.glance.add(1, SIZE_BYTES)
    forbidden = ImageForbidden(f"image {record.id}: forbidden")
    gate = trio.Event()
    rig.glance.replies.append(Reply(gate=gate, error=forbidden))
    async with trio.open_nursery() as nursery:
        task = Task(nursery, lambda: catalog.lookup(record.base_name))
        await wait_all_tasks_blocked()
        while not rig.glance.ranges:
            await wait_all_tasks_blocked(0.001)
        rig.glance.image_error = forbidden
        gate.set()
    assert task.result is None
    rig.glance.image_error = None
    mock_clock.jump(2.1)
    assert await found(catalog, record.base_name)
    assert catalog.refusals() == []


async def test_half_judged_image_is_judged_anew_by_the_next_daemon(
    rig: ImageRig, catalog: Catalog, nursery: trio.Nursery
) -> None:
    """[I8] Killed before the verdict, nothing is published: the next daemon asks and judges."""
    record = rig.glance.add(1, SIZE_BYTES, disk_format="qcow2")
    rig.glance.replies.append(Reply(gate=trio.Event()))
    Task(nursery, lambda: catalog.lookup(record.base_name))
    while not rig.glance.ranges:
        await wait_all_tasks_blocked(0.001)
    rig.cache.close_image(record.key("stored"))
    assert rig.cache.index.entries()
    second = rig.catalog()
    assert second.entries() == []
    assert await second.lookup(record.base_name) is None
    assert rig.cache.index.entries() == []
