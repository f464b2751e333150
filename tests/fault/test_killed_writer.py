"""A process that writes to the cache is killed at any moment: what it committed is there, and nothing else is wrong."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_images import content, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_range
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.index import PAGE_CHUNKS

WRITER = """
import random, sys
from pathlib import Path
from store_images import chunks_content, open_new
from lazyimg.store.cachedir import CacheDir, CacheStatistics

path, size_bytes, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)
cache = CacheDir(path)
key = cache.index.entries()[0].key
file = cache.open_image(key)
print("ready", flush=True)
while True:
    for _ in range(rng.randrange(1, 5)):
        first = rng.randrange(file.chunk_count - 3)
        file.write(first, chunks_content(1, first, 3, size_bytes))
    if rng.random() < 0.3:
        dropped = rng.randrange(file.chunk_count)
        print("dropping", dropped, flush=True)
        file.drop([dropped])
    file.commit()
    absent = set(file.absent(range(file.chunk_count)))
    print("committed", *(chunk for chunk in range(file.chunk_count) if chunk not in absent), flush=True)
"""


@pytest.mark.slow
def test_killed_writer_leaves_only_right_bytes(tmp_path: Path) -> None:
    """Invariant 9: after kill -9 at any moment what was committed is present and what is present is right.

    Ten rounds on one cache: open, write, drop and commit at random, killed after 0 to 0.2 s.
    """
    count = 3 * PAGE_CHUNKS
    size_bytes = count * CHUNK - 5
    path = tmp_path / "cache"
    cache = CacheDir(path)
    open_new(cache, 1, size_bytes)
    cache.close()
    rng = random.Random(2)
    committed: set[int] = set()
    for seed in range(10):
        committed = _write_until_killed(path, size_bytes, seed, rng.uniform(0, 0.2), committed)
        cache = CacheDir(path)
        file = cache.open_image(cache.index.entries()[0].key)
        absent = set(file.absent(range(count)))
        assert not absent & committed
        for chunk in set(range(count)) - absent:
            start, stop = chunk_range(chunk, size_bytes)
            assert file.read(start, stop) == content(1, start, stop)
        cache.close()
    assert committed


def _write_until_killed(
    path: Path, size_bytes: int, seed: int, after_s: float, committed: set[int]
) -> set[int]:
    """Return the chunks that must be present: those of the last commit, without any drop begun after it."""
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, str(size_bytes), str(seed)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "ready\n"
        # The moment of the kill is the thing under test, not a wait for anything.
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(after_s)
    finally:
        writer.kill()
    said = writer.stdout.read()
    writer.stdout.close()
    assert writer.wait() == -signal.SIGKILL
    # The last line may be torn by the kill.
    for line in said.splitlines(keepends=True):
        word, *chunks = line.split()
        if word == "dropping":
            # A torn number drops more than was dropped, which only weakens this round.
            committed = committed - set(map(int, chunks)) if line.endswith("\n") else set()
        elif line.endswith("\n"):
            committed = set(map(int, chunks))
    return committed
