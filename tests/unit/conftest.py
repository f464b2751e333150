"""What several modules share: an empty cache, and the image layer wired on it over a Glance in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from image_fakes import ImageRig

from lazyimg.image.catalog import Catalog
from lazyimg.store.cachedir import CacheDir


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[CacheDir]:
    """An empty cache in the test's own folder `cache`; closed when all tasks have ended."""
    cache = CacheDir(tmp_path / "cache")
    yield cache
    cache.close()


@pytest.fixture
def rig(cache: CacheDir, nursery: trio.Nursery) -> ImageRig:
    """The image layer on that cache, its Glance empty.

    Threads run in real time: who needs time to pass asks for `mock_clock`, and moves it by hand.
    """
    return ImageRig(cache, nursery)


@pytest.fixture
def catalog(rig: ImageRig) -> Catalog:
    """The first catalog over that cache."""
    return rig.catalog()
