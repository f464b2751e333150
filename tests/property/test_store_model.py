"""A chunk file against a model of it: writes, commits, restarts, damage, failed syncs, a lost index, eviction.

A read returns the bytes of the image or names the chunks it lacks, and the file and the model agree
on which chunks are present.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_images import chunks_content, content, damage, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunks_of
from lazyimg.errors import ChunkAbsent, ChunkDamaged
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile

# Three pages of presence, the last chunk short; chunks are taken from where pages begin and end.
SIZE_BYTES = 2051 * CHUNK - 77
CHUNKS = st.sampled_from([*range(4), *range(1021, 1027), *range(2045, 2051)])
SPANS = st.tuples(CHUNKS, st.integers(1, 3)).map(lambda span: range(span[0], min(sum(span), 2051)))


@st.composite
def byte_ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Return a range of bytes that is not empty and within the file."""
    start = min(draw(CHUNKS) * CHUNK + draw(st.integers(0, CHUNK - 1)), SIZE_BYTES - 1)
    return start, min(start + draw(st.integers(1, 3 * CHUNK)), SIZE_BYTES)


class StoreModel(RuleBasedStateMachine):
    """durable, written: chunks present with and without commit.  damaged: durable, with other bytes."""

    file: ChunkFile

    @initialize()
    def open_cache(self) -> None:
        """Begin with an empty cache; one page of presence in memory makes every page come and go."""
        self.folder = Path(tempfile.mkdtemp(prefix="lazyimg-model-"))
        self.cache = CacheDir(self.folder / "cache", pages_max=1)
        self.file = open_new(self.cache, 1, SIZE_BYTES)
        self.durable: set[int] = set()
        self.written: set[int] = set()
        self.damaged: set[int] = set()

    def teardown(self) -> None:
        """Close and remove the folder."""
        self.cache.close()
        shutil.rmtree(self.folder)

    def lose(self, chunks: set[int]) -> None:
        """Take chunks out of the model."""
        self.durable -= chunks
        self.written -= chunks
        self.damaged -= chunks

    @rule(span=SPANS)
    def write(self, span: range) -> None:
        """Write a few chunks; those present stay as they are, even if their bytes on disk are damaged."""
        self.file.write(span.start, chunks_content(1, span.start, len(span), SIZE_BYTES))
        self.written |= set(span) - self.durable

    @rule()
    def commit(self) -> None:
        """What was written becomes durable."""
        assert self.file.commit() == len(self.written)
        self.durable |= self.written
        self.written = set()

    @rule()
    def fail_to_sync(self) -> None:
        """What was written becomes absent when the disk cannot sync it."""
        with _failing_fdatasync():
            if self.written:
                with pytest.raises(OSError, match="injected"):
                    self.file.commit()
            else:
                assert self.file.commit() == 0
        self.written = set()

    @rule(span=SPANS)
    def drop(self, span: range) -> None:
        """Dropped chunks are absent."""
        self.file.drop(list(span))
        self.lose(set(span))

    @rule(chunk=CHUNKS, is_restarted=st.booleans())
    def close_damage_and_open(self, chunk: int, is_restarted: bool) -> None:
        """While the file is closed a chunk's bytes change, present or not; what was not committed is lost."""
        self.cache.close_image(self.file.key)
        damage(self.file.path, chunk)
        self.damaged ^= {chunk} & self.durable
        self.open_again(is_restarted)

    @rule(is_restarted=st.booleans(), is_index_lost=st.booleans())
    def open_again(self, is_restarted: bool, is_index_lost: bool = False) -> None:
        """Close and open the file, or the whole cache; what an index knew that is lost, the sidecars know."""
        self.cache.close_image(self.file.key)
        if is_restarted:
            self.cache.close()
            if is_index_lost:
                shutil.rmtree(self.folder / "cache" / "index")
            self.cache = CacheDir(self.folder / "cache", pages_max=1)
        self.file = self.cache.open_image(self.file.key)
        self.written = set()

    @rule()
    def evict(self) -> None:
        """The image is removed and comes back empty."""
        self.cache.remove_image(self.file.key)
        self.file = open_new(self.cache, 1, SIZE_BYTES)
        self.lose(self.durable | self.written)

    @rule(bounds=byte_ranges())
    def read(self, bounds: tuple[int, int]) -> None:
        """A read returns the image's bytes, or names exactly the chunks that are absent or damaged."""
        touched = set(chunks_of(*bounds))
        absent, damaged = touched - self.durable - self.written, touched & self.damaged
        quick = self.file.read_nowait(*bounds)
        assert quick is None or (quick == content(1, *bounds) and not absent | damaged)
        if absent:
            with pytest.raises(ChunkAbsent) as not_there:
                self.file.read(*bounds)
            assert set(not_there.value.chunks) == absent
        elif damaged:
            with pytest.raises(ChunkDamaged) as not_right:
                self.file.read(*bounds)
            assert set(not_right.value.chunks) == damaged
            self.lose(damaged)
        else:
            assert self.file.read(*bounds) == content(1, *bounds)

    @rule()
    def verify(self) -> None:
        """Verify finds every damaged chunk and no other."""
        present = self.durable | self.written
        assert self.file.verify() == (len(present), sorted(self.damaged))
        self.lose(set(self.damaged))

    @rule(span=SPANS)
    def ask_what_is_absent(self, span: range) -> None:
        """Absence is told rightly, or without blocking not at all."""
        expected = sorted(set(span) - self.durable - self.written)
        assert self.file.absent_nowait(span) in (None, expected)
        assert self.file.absent(span) == expected

    @invariant()
    def counts_agree(self) -> None:
        """The counts are those of the model."""
        assert self.file.present_count == len(self.durable | self.written)
        assert self.file.written_count == len(self.written)


@contextmanager
def _failing_fdatasync() -> Iterator[None]:
    with mock.patch("lazyimg.store.chunkfile.os.fdatasync", side_effect=OSError(errno.EIO, "injected")):
        yield


TestStoreModel = StoreModel.TestCase
TestStoreModel.settings = settings(
    max_examples=int(os.environ.get("STORE_MODEL_EXAMPLES", "40")),
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _damage_is_logged(expected_warnings: Callable[..., None]) -> None:
    """Damage and loss are injected at will, so their warnings are expected."""
    expected_warnings("damaged chunks dropped", "index rebuilt from sidecars", required=False)
