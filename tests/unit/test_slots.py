"""Slots for flights and the budget of unwritten bytes, shared by all images."""

from __future__ import annotations

from collections.abc import Callable

import trio
from trio.testing import wait_all_tasks_blocked

from lazyimg.image.slots import GUESSES_MAX, IMAGE_GUESSES_MAX, ByteBudget, FlightSlots, Guesses


class Image:
    """Takes a slot for each want of its own, as a fetcher does whenever it is called."""

    def __init__(self, slots: FlightSlots, order: list[str], name: str) -> None:
        self.slots, self.order, self.name = slots, order, name
        self.urgent = self.background = 0
        self.is_paused = False

    def pump(self) -> None:
        if self.is_paused:
            return
        for urgent in (True, False):
            while self.urgent if urgent else self.background:
                if not self.slots.take_nowait(urgent=urgent, when_free=self.pump):
                    break
                self.order.append(self.name)
                if urgent:
                    self.urgent -= 1
                else:
                    self.background -= 1


def images_on(slots: FlightSlots, names: str) -> tuple[list[str], list[Image]]:
    """Return the order in which slots are taken, to be filled, and an image for each letter."""
    order: list[str] = []
    return order, [Image(slots, order, name) for name in names]


def never() -> None:
    raise AssertionError("called without having waited")


def fill(slots: FlightSlots, *, urgent: bool, count: int) -> None:
    for _ in range(count):
        assert slots.take_nowait(urgent=urgent, when_free=never)


def test_no_more_flights_than_allowed() -> None:
    """[I5] Neither all flights nor those of background work exceed their limit."""
    slots = FlightSlots(3, 2)
    fill(slots, urgent=False, count=2)
    assert not slots.take_nowait(urgent=False, when_free=lambda: None)
    fill(slots, urgent=True, count=1)
    assert not slots.take_nowait(urgent=True, when_free=lambda: None)


def test_urgent_is_served_before_background_that_waited_longer() -> None:
    """[I4] With all slots taken by background work, the next free one goes to an urgent want."""
    slots = FlightSlots(2, 2)
    fill(slots, urgent=False, count=2)
    order, (patient, reader) = images_on(slots, "pr")
    patient.background = 1
    patient.pump()
    reader.urgent = 1
    reader.pump()
    slots.give_back(urgent=False)
    assert order == ["r"]
    slots.give_back(urgent=False)
    assert order == ["r", "p"]


def test_background_starts_nothing_while_urgent_waits() -> None:
    """[I4] A slot that comes free for a moment is not background's while a reader waits for one."""
    slots = FlightSlots(1, 1)
    fill(slots, urgent=True, count=1)
    slots.take_nowait(urgent=True, when_free=lambda: None)
    assert not slots.take_nowait(urgent=False, when_free=lambda: None)


def test_images_take_turns() -> None:
    """An image with many wants does not keep another from its one."""
    slots = FlightSlots(1, 1)
    fill(slots, urgent=True, count=1)
    order, (greedy, modest) = images_on(slots, "gm")
    greedy.urgent, modest.urgent = 5, 1
    greedy.pump()
    modest.pump()
    for _ in range(3):
        slots.give_back(urgent=True)
    assert order == ["g", "m", "g"]


def test_slot_that_the_first_in_turn_does_not_want_goes_to_the_next() -> None:
    """[I6] One image that pauses, or whose reader left, never costs another image's reader its wake-up."""
    slots = FlightSlots(1, 1)
    fill(slots, urgent=True, count=1)
    order, (left, paused, waiting) = images_on(slots, "lpw")
    for image in (left, paused, waiting):
        image.urgent = 1
        image.pump()
    left.urgent = 0
    paused.is_paused = True
    slots.give_back(urgent=True)
    assert order == ["w"]


def test_slot_that_no_urgent_want_takes_goes_to_background() -> None:
    """Background work goes on as soon as nothing urgent waits in earnest."""
    slots = FlightSlots(1, 1)
    fill(slots, urgent=True, count=1)
    order, (left, patient) = images_on(slots, "lp")
    left.urgent = patient.background = 1
    left.pump()
    patient.pump()
    left.urgent = 0
    slots.give_back(urgent=True)
    assert order == ["p"]


def test_waiting_background_above_its_limit_is_left_waiting() -> None:
    """A slot that only urgent flights may take stays free, and calls nobody in vain for ever."""
    slots = FlightSlots(2, 1)
    fill(slots, urgent=False, count=1)
    fill(slots, urgent=True, count=1)
    order, (patient,) = images_on(slots, "p")
    patient.background = 1
    patient.pump()
    slots.give_back(urgent=True)
    assert order == []
    slots.give_back(urgent=False)
    assert order == ["p"]


async def test_budget_bounds_unwritten_bytes(nursery: trio.Nursery) -> None:
    """[I5] Who receives more than may be unwritten waits until some of it is written."""
    budget = ByteBudget(100)
    taken: list[str] = []
    await budget.take(60)
    nursery.start_soon(_take, budget, 60, taken, "second")
    nursery.start_soon(_take, budget, 40, taken, "third")
    await wait_all_tasks_blocked()
    assert taken == ["third"]
    budget.give_back(60)
    await wait_all_tasks_blocked()
    assert taken == ["third", "second"]


async def test_one_taker_larger_than_the_budget_goes_alone(nursery: trio.Nursery) -> None:
    """A piece larger than the whole budget is not stuck for ever; it waits until it is the only one."""
    budget = ByteBudget(10)
    taken: list[str] = []
    await budget.take(5)
    nursery.start_soon(_take, budget, 50, taken, "large")
    await wait_all_tasks_blocked()
    assert taken == []
    budget.give_back(5)
    await wait_all_tasks_blocked()
    assert taken == ["large"]


async def _take(budget: ByteBudget, size_bytes: int, taken: list[str], name: str) -> None:
    await budget.take(size_bytes)
    taken.append(name)


def test_callbacks_are_called_once_each() -> None:
    """Asking twice does not stand in the queue twice."""
    slots = FlightSlots(1, 1)
    fill(slots, urgent=True, count=1)
    calls: list[int] = []
    when_free: Callable[[], None] = lambda: calls.append(1)  # noqa: E731  # one object, asked with twice
    for _ in range(2):
        assert not slots.take_nowait(urgent=True, when_free=when_free)
    slots.give_back(urgent=True)
    assert calls == [1]


def test_lookups_have_slots_that_reads_cannot_take() -> None:
    """[I6] Reads that stall leave slots in which a lookup's flight starts at once, and no more than those."""
    slots = FlightSlots(16, 4)
    fill(slots, urgent=True, count=14)
    assert not slots.take_nowait(urgent=True, when_free=lambda: None)
    assert not slots.take_nowait(urgent=False, when_free=lambda: None)
    for _ in range(2):
        assert slots.take_nowait(urgent=True, when_free=never, for_lookup=True)
    assert not slots.take_nowait(urgent=True, when_free=lambda: None, for_lookup=True)


def test_lookup_that_waits_is_served_before_reads_that_wait() -> None:
    """[I6] A slot that becomes free goes to the lookup, the next one to the read that came before it."""
    slots = FlightSlots(8, 1)
    fill(slots, urgent=True, count=7)
    assert slots.take_nowait(urgent=True, when_free=never, for_lookup=True)
    served: list[str] = []

    def serve(name: str, *, for_lookup: bool) -> Callable[[], None]:
        def when_free() -> None:
            assert slots.take_nowait(urgent=True, when_free=never, for_lookup=for_lookup)
            served.append(name)

        return when_free

    read, lookup = serve("read", for_lookup=False), serve("lookup", for_lookup=True)
    assert not slots.take_nowait(urgent=True, when_free=read)
    assert not slots.take_nowait(urgent=True, when_free=lookup, for_lookup=True)
    slots.give_back(urgent=True)
    assert served == ["lookup"]
    slots.give_back(urgent=True)
    assert served == ["lookup"], "what is free now is kept for lookups"
    slots.give_back(urgent=True)
    assert served == ["lookup", "read"]


def test_guesses_are_limited_for_each_image_and_for_all() -> None:
    """[I5] What is wanted in the background has a limit of its own, and leaves room when it goes."""
    guesses = Guesses()
    guesses.note("a", 500)
    assert guesses.room("a") == IMAGE_GUESSES_MAX - 500
    assert guesses.room("b") == IMAGE_GUESSES_MAX
    for number in range(GUESSES_MAX // IMAGE_GUESSES_MAX):
        guesses.note(number, IMAGE_GUESSES_MAX)
    assert guesses.room("b") == 0
    guesses.note("a", 0)
    guesses.note(0, 500)
    assert guesses.room("b") == 12
    assert guesses.room(0) == 12
    # Work that somebody waits for may be more.
    guesses.note("a", 10_000)
    assert guesses.room("b") == 0


def test_slots_are_crowded_while_a_reader_waits_for_one() -> None:
    """Background work that waits crowds nobody."""
    slots = FlightSlots(1, 1)
    fill(slots, urgent=True, count=1)
    assert not slots.take_nowait(urgent=False, when_free=lambda: None)
    assert not slots.is_crowded
    assert not slots.take_nowait(urgent=True, when_free=lambda: None)
    assert slots.is_crowded
    slots.give_back(urgent=True)
    assert not slots.is_crowded
