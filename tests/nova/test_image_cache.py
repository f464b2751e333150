"""Nova's image cache manager, unmodified, on the mount: it ages, keeps and removes as in a plain folder."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acting_user import run_as
from disks import assert_reads_as, made_as, qemu
from nova_host import NOVA_GID, NOVA_UID, NovaHost
from real_mount import Mount
from served_glance import MIB, ServedGlance

pytestmark = pytest.mark.slow

# Nova's default, remove_unused_original_minimum_age_seconds, is a day.
OLD_S = 25 * 3600


@pytest.fixture(autouse=True)
def _no_other_instances(host: NovaHost) -> Iterator[None]:
    """What other tests started is no longer in use."""
    host.nova.forget_all()
    yield
    host.nova.forget_all()


def age(path: Path, seconds: float = OLD_S) -> float:
    """Let a file be unused for so long; return its mtime."""
    then = int(time.time() - seconds)
    os.utime(path, (then, then))
    assert path.stat().st_mtime == then
    return then


def names(host: NovaHost) -> set[str]:
    return {path.name for path in host.base.iterdir()}


def test_used_image_is_kept_and_its_use_noted(host: NovaHost, mount: Mount, glance: ServedGlance) -> None:
    """An image that an instance uses stays however old its mtime is, which is set to now."""
    image = glance.add(8 * MIB)
    host.spawn(image.id)
    then = age(mount.path_of(image))
    host.nova.manage_image_cache()
    assert image.base_name in names(host)
    assert mount.path_of(image).stat().st_mtime > then + OLD_S / 2


def test_unused_image_goes_after_its_age_and_comes_back_when_needed(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """It stays until it is old, is gone from the listing then, and the next instance finds it as ever."""
    image = glance.add(made_as(tmp_path, "qcow2", 5, 8 * MIB), disk_format="qcow2")
    first = host.spawn(image.id)
    host.nova.forget(uuid=first.name)
    host.nova.manage_image_cache()
    assert image.base_name in names(host), "too young"
    age(mount.path_of(image))
    host.nova.manage_image_cache()
    assert image.base_name not in names(host)
    assert_reads_as(host.spawn(image.id) / "disk", "qcow2", 5, 8 * MIB)
    assert image.base_name in names(host)
    assert mount.path_of(image).stat().st_mtime > time.time() - OLD_S / 2, "its age starts anew"
    host.nova.manage_image_cache()
    assert image.base_name in names(host)
    assert all(one["range"] for one in glance.data_requests(image))


def test_image_removed_under_a_stopped_guest_reads_on(
    host: NovaHost, mount: Mount, glance: ServedGlance, tmp_path: Path
) -> None:
    """Nova of another host may remove a base by mistake; a lazy one is found again by whoever opens the overlay."""
    image = glance.add(made_as(tmp_path, "qcow2", 6, 8 * MIB), disk_format="qcow2")
    disk = host.spawn(image.id) / "disk"
    mount.path_of(image).unlink()
    assert image.base_name not in names(host)
    assert_reads_as(disk, "qcow2", 6, 8 * MIB)


def test_age_outlives_the_daemon(host: NovaHost, mount: Mount, glance: ServedGlance) -> None:
    """An mtime is kept across restarts: an old image is not made young, and a young one not removed."""
    old, young = glance.add(8 * MIB), glance.add(8 * MIB)
    for image in (old, young):
        folder = host.spawn(image.id)
        host.nova.forget(uuid=folder.name)
    age(mount.path_of(old))
    mount.kill_daemon()
    host.nova.manage_image_cache()
    assert old.base_name not in names(host)
    assert young.base_name in names(host)


def test_image_that_was_only_looked_at_is_not_listed(host: NovaHost, glance: ServedGlance) -> None:
    """Every image Glance has can be looked up, but a cache manager sees those in use here alone."""
    image = glance.add(8 * MIB)
    assert (host.base / image.base_name).exists()
    assert image.base_name not in names(host)


def test_ephemeral_and_swap_bases_are_kept_in_use_and_removed_after(
    host: NovaHost, glance: ServedGlance
) -> None:
    """As user nova, through the mount, in the upper folder."""
    folder = host.spawn(glance.add(8 * MIB).id, ephemeral_gb=2, swap_mb=32)
    (ephemeral,) = host.base.glob("ephemeral_2_*")
    swap = host.base / "swap_32"
    for path in (ephemeral, swap):
        age(path)
    host.nova.manage_image_cache()
    for path in (ephemeral, swap):
        assert path.stat().st_mtime > time.time() - OLD_S / 2
    host.nova.forget(uuid=folder.name)
    for path in (ephemeral, swap):
        age(path)
    host.nova.manage_image_cache()
    assert not {ephemeral.name, swap.name} & names(host)


def test_real_bases_age_like_lazy_ones_and_other_names_are_left_alone(host: NovaHost) -> None:
    """A base that plain Nova downloaded once, and its resized copies, go when unused; a stranger's file does not."""
    digest = hashlib.sha1(str(uuid.uuid4()).encode()).hexdigest()
    base, resized, stranger = (
        host.base / name for name in (digest, f"{digest}_10", "README of the operator")
    )
    for path in (base, resized, stranger):
        path.write_bytes(b"x" * 4096)
        os.chown(path, NOVA_UID, NOVA_GID)
        age(path)
    host.nova.manage_image_cache()
    assert names(host) & {base.name, resized.name, stranger.name} == {stranger.name}
    stranger.unlink()


def test_instance_without_an_image_costs_glance_nothing(host: NovaHost, glance: ServedGlance) -> None:
    """Booted from a volume its image is "", whose name the manager looks up at each pass: no request is made."""
    host.nova.add_instance_without_image()
    host.nova.manage_image_cache()
    lists = len(glance.list_requests())
    host.nova.manage_image_cache()
    assert len(glance.list_requests()) == lists
    assert hashlib.sha1(b"").hexdigest() not in names(host)


def test_pass_without_glance_is_quick_and_keeps_what_is_used(
    make_host: Callable[..., tuple[NovaHost, Mount]], make_glance: Callable[..., ServedGlance], tmp_path: Path
) -> None:
    """While Glance is down the manager notes uses and removes what is old as ever, and guests read what is here."""
    served = make_glance()
    host, mount = make_host(served=served)
    used, unused = (served.add(8 * MIB) for _ in range(2))
    disk = host.spawn(used.id) / "disk"
    host.nova.forget(uuid=host.spawn(unused.id).name)
    mount.fetch_all(used)
    for image in (used, unused):
        age(mount.path_of(image))
    served.stop()
    started = time.monotonic()
    host.nova.manage_image_cache()
    assert time.monotonic() - started < 20
    assert names(host) & {used.base_name, unused.base_name} == {used.base_name}
    assert host.nova.image_info(path=str(disk))["backing"] == str(mount.path_of(used))
    (tmp_path / "used").write_bytes(used.content)
    assert "identical" in qemu("qemu-img", "compare", "-f", "qcow2", "-F", "raw", disk, tmp_path / "used")


def test_only_who_may_notes_a_use(host: NovaHost, mount: Mount, glance: ServedGlance) -> None:
    """utime of a base by a user who is neither its owner nor root is refused, as in a plain folder."""
    image = glance.add(8 * MIB)
    base = mount.path_of(image)
    before = base.stat().st_mtime_ns
    program = f"result = attempt(os.utime, {str(base)!r}, (1, 1)), attempt(os.unlink, {str(base)!r})"
    assert run_as(host.folder, program, uid=NOVA_UID - 1, gid=NOVA_GID - 1) == ["EPERM", "EACCES"]
    assert base.stat().st_mtime_ns == before
    assert run_as(host.folder, f"result = attempt(os.utime, {str(base)!r}, (1, 1))") is None
    assert base.stat().st_mtime == 1
