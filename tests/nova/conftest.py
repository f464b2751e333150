"""Hypervisors with the real Nova, their `_base` mounted or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from mount_fixtures import _shared_glance, _watchdog, glance, make_glance, mountable  # noqa: F401  (used by name)
from nova_host import NovaHost, nova_host
from real_mount import Mount, mounts
from served_glance import ServedGlance
from setup_nova import is_ready


@pytest.fixture(scope="session")
def real_nova(mountable: None, require: Callable[..., None]) -> None:  # noqa: F811  (the fixture's name)
    """Skip where the real Nova, or what it calls, is missing."""
    require("qemu-img", "qemu-io", "mkfs.ext4", "mkswap", "prlimit")
    if not is_ready():
        pytest.skip("the real Nova is missing here; `make test` installs it")


@pytest.fixture(scope="session")
def _shared_host(
    real_nova: None,
    _shared_glance: ServedGlance,  # noqa: F811  (the fixture's name)
) -> Iterator[tuple[NovaHost, Mount]]:
    with nova_host(_shared_glance.url) as host, mounts() as made:
        yield (
            host,
            made.make(
                host.instances,
                _shared_glance.url,
                cache_dir=host.folder / "cache",
                control=host.folder / "c.sock",
                view="raw",
            ),
        )


@pytest.fixture
def host(_shared_host: tuple[NovaHost, Mount], glance: ServedGlance) -> NovaHost:  # noqa: F811
    """A hypervisor with Nova's default settings and lazyimg on its `_base`; each test brings its own images."""
    return _shared_host[0]


@pytest.fixture
def mount(_shared_host: tuple[NovaHost, Mount]) -> Mount:
    """The mount of `host`."""
    return _shared_host[1]


@pytest.fixture
def make_host(
    real_nova: None,
    glance: ServedGlance,  # noqa: F811
) -> Iterator[Callable[..., tuple[NovaHost, Mount]]]:
    """Return `make_host(more_config="", served=None, start=True, **config)`: a hypervisor of the test's own.

    With its mount, which is started unless start is False.  served: a Glance of the test's own, for Nova too.
    """
    with contextlib.ExitStack() as hosts, mounts() as made, _watchdog(made):

        def make(
            more_config: str = "", served: ServedGlance | None = None, **config: object
        ) -> tuple[NovaHost, Mount]:
            url = (served or glance).url
            host = hosts.enter_context(nova_host(url, more_config))
            config = {"view": "raw", **config}
            mount = made.make(
                host.instances, url, cache_dir=host.folder / "cache", control=host.folder / "c.sock", **config
            )  # type: ignore[arg-type]
            return host, mount

        yield make
