"""A cache that holds one image of sixteen chunks, for the tests that spoil it.

Expected of each spoiling: a read returns the image's bytes or says which chunks it lacks, the cache opens, and what
was lost can be stored again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from store_images import chunks_content, content, image_entry, open_new

from lazyimg.core.chunks import CHUNK_SIZE_BYTES as CHUNK
from lazyimg.core.chunks import chunk_range
from lazyimg.errors import ChunkAbsent, ChunkDamaged
from lazyimg.store.cachedir import CacheDir
from lazyimg.store.chunkfile import ChunkFile

COUNT = 16
SIZE_BYTES = COUNT * CHUNK - 9
KEY = image_entry(1, SIZE_BYTES).key
WHOLE = content(1, 0, SIZE_BYTES)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[CacheDir, ChunkFile]]:
    """The cache and its one image, made known where it is not."""
    cache = CacheDir(path)
    try:
        yield cache, cache.open_image(KEY) if cache.index.get(KEY) else open_new(cache, 1, SIZE_BYTES)
    finally:
        cache.close()


def write(file: ChunkFile, first: int, count: int) -> None:
    file.write(first, chunks_content(1, first, count, SIZE_BYTES))


def fill(path: Path) -> Path:
    """Store the whole image and close the cache; return the chunk file."""
    with opened(path) as (_, file):
        write(file, 0, COUNT)
        file.commit()
        return file.path


def check_and_refill(file: ChunkFile) -> None:
    """Each present chunk has the image's bytes; the others can be stored and all is right again."""
    for chunk in range(COUNT):
        with contextlib.suppress(ChunkAbsent, ChunkDamaged):
            assert file.read(*chunk_range(chunk, SIZE_BYTES)) == content(1, *chunk_range(chunk, SIZE_BYTES))
    write(file, 0, COUNT)
    assert file.read(0, SIZE_BYTES) == WHOLE
    file.commit()
    assert file.is_whole
