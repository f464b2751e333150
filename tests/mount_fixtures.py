"""Fixtures of the tests through a real mount; conftest.py of their folders takes them in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faulty_disk import FaultyDisk
from real_mount import Mount, Mounts, mounts
from served_glance import ServedGlance

from lazyimg.demo.guest import Guest, build_guest, default_cache_dir

# Longer than any test of these takes on a busy machine, shorter than pytest's own limit.
WATCHDOG_S = 200


@pytest.fixture(scope="session")
def mountable(require: Callable[..., None]) -> None:
    """Skip where nothing can be mounted."""
    require("/dev/fuse", "fusermount3")


@pytest.fixture(scope="session")
def _shared_glance(mountable: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGlance]:
    served = ServedGlance(tmp_path_factory.mktemp("glance"))
    yield served
    served.stop()


@pytest.fixture
def glance(_shared_glance: ServedGlance) -> Iterator[ServedGlance]:
    """A Glance shared by all tests, in good health at each one's start."""
    _shared_glance.fail()
    yield _shared_glance
    _shared_glance.fail()


@pytest.fixture(scope="session")
def _shared_mount(
    _shared_glance: ServedGlance, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Mounts, Mount]]:
    with mounts() as made:
        yield made, made.make(tmp_path_factory.mktemp("m"), _shared_glance.url)


@pytest.fixture
def mounted(_shared_mount: tuple[Mounts, Mount], glance: ServedGlance) -> Iterator[Mount]:
    """A mount of `glance` shared by the tests that do it no harm; each brings its own images."""
    with _watchdog(_shared_mount[0]):
        yield _shared_mount[1]


@pytest.fixture(scope="session")
def _shared_raw_mount(
    _shared_glance: ServedGlance, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Mounts, Mount]]:
    with mounts() as made:
        yield made, made.make(tmp_path_factory.mktemp("raw"), _shared_glance.url, view="raw")


@pytest.fixture
def raw_mount(_shared_raw_mount: tuple[Mounts, Mount], glance: ServedGlance) -> Iterator[Mount]:
    """As `mounted`, in the raw view."""
    with _watchdog(_shared_raw_mount[0]):
        yield _shared_raw_mount[1]


@pytest.fixture
def make_mount(mountable: None, tmp_path: Path) -> Iterator[Callable[..., Mount]]:
    """Return `make_mount(glance, name="m", start=True, cache_dir=None, **config)`: a mount of the test's own."""
    with mounts() as made, _watchdog(made):

        def make(glance: ServedGlance | str, name: str = "m", **config: object) -> Mount:
            endpoint = glance if isinstance(glance, str) else glance.url
            return made.make(tmp_path / name, endpoint, **config)  # type: ignore[arg-type]

        yield make


@pytest.fixture
def make_glance(mountable: None, tmp_path: Path) -> Iterator[Callable[..., ServedGlance]]:
    """Return `make_glance(*options)`: a Glance of the test's own, that may be stopped."""
    made: list[ServedGlance] = []

    def make(*options: str) -> ServedGlance:
        made.append(ServedGlance(tmp_path / f"glance{len(made)}", *options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def faulty_disk(mountable: None, tmp_path: Path) -> Iterator[FaultyDisk]:
    """A mounted disk, healthy until it is told to fail, for the cache folder of the test's mounts.

    A test that asks for it together with `make_mount` names `faulty_disk` first: mounts must end before their disk.
    """
    disk = FaultyDisk(tmp_path / "faulty")
    yield disk
    disk.end()


@pytest.fixture(scope="session")
def guest(require: Callable[..., None]) -> Guest:
    """The demo's guest, from the cache it shares with `lazyimg demo`."""
    require("qemu-system-x86_64", "qemu-img", "mkfs.ext4", "dpkg-deb", "apt-get")
    return build_guest(default_cache_dir())


class _watchdog:
    """Ends all mounts if a test hangs: its reads then fail, and so does it."""

    def __init__(self, made: Mounts) -> None:
        self._timer = threading.Timer(WATCHDOG_S, made.end_all)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *_exc: object) -> None:
        self._timer.cancel()
        self._timer.join()
