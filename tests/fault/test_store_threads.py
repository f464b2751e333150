"""Many threads on one chunk file at once: what is read is right, and the counts agree at the end."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from store_images import chunks_content, content, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.errors import ChunkAbsent
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.index import PAGE_CHUNKS


@pytest.mark.slow
def test_threads_together_never_read_a_wrong_byte(tmp_path: Path) -> None:
    """Invariant 1 under load: readers, writers, a dropper and commits at once, the hot path among them."""
    count = PAGE_CHUNKS + 40
    size_bytes = count * CHUNK - 5
    cache = CacheDir(tmp_path / "cache", pages_max=1)
    file = open_new(cache, 1, size_bytes)
    # Few chunks, on both sides of the end of a page, so that threads meet.
    first = PAGE_CHUNKS - 4
    expected = content(1, first * CHUNK, (first + 8) * CHUNK)
    chunks = chunks_content(1, first, 8, size_bytes)
    hits = [0, 0]
    stop = threading.Event()

    def reader(rng: random.Random, read: Callable[[int, int], bytes | None], slot: int) -> None:
        low = rng.randrange(8 * CHUNK - 1)
        high = min(low + rng.randrange(1, 2 * CHUNK), 8 * CHUNK)
        with contextlib.suppress(ChunkAbsent):
            data = read(first * CHUNK + low, first * CHUNK + high)
            if data is not None:
                assert data == expected[low:high]
                hits[slot] += 1

    def writer(rng: random.Random) -> None:
        at = rng.randrange(8)
        file.write(first + at, chunks[at : at + rng.randrange(1, 4)])

    def dropper(rng: random.Random) -> None:
        file.drop([first + rng.randrange(8)])

    def repeat(seed: int, act: Callable[[random.Random], object]) -> None:
        rng = random.Random(seed)
        try:
            while not stop.is_set():
                act(rng)
        except BaseException as exc:
            failures.append(exc)
            stop.set()

    failures: list[BaseException] = []
    acts: list[Callable[[random.Random], object]] = [
        lambda rng: reader(rng, file.read, 1),
        lambda rng: reader(rng, file.read, 1),
        writer,
        writer,
        dropper,
        lambda _: file.commit(),
        lambda _: file.absent(range(count)),
    ]
    threads = [threading.Thread(target=repeat, args=(seed, act)) for seed, act in enumerate(acts)]
    for thread in threads:
        thread.start()
    # The hot path belongs to one thread: this one.
    rng = random.Random(99)
    for _ in range(100_000):
        if stop.is_set():
            break
        reader(rng, file.read_nowait, 0)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(hits)
    assert file.verify()[1] == []
    file.commit()
    present = count - len(file.absent(range(count)))
    assert file.present_count == present
    cache.close_image(file.key)
    assert cache.open_image(file.key).present_count == present
    cache.close()
