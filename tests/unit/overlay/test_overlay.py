"""The companion's overlays on a plain folder as the mount: real qemu-img, real locks, a scripted client."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scripted_mount import GIB, MIB, ScriptedClient, fake_qemu_img, info, noise, qcow2

from lazyimg.control import ControlClient
from lazyimg.errors import (
    DestinationRefused,
    ImageNotFound,
    ImageRefused,
    InUse,
    LazyImgError,
    MountFailed,
)
from lazyimg.overlay import baselock, create_overlay, placement, qemuimg

# ── overlays ──


def test_overlay_on_raw_reads_as_the_image(
    scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """The overlay names base and format, reads as the image and then zeros, and is all there is."""
    content = noise(3 * MIB)
    facts = scripted.add(content, "raw")
    result = create_overlay(client, facts.id, out / "disk", size_bytes=GIB)
    assert (result.size_bytes, result.base_format, result.image_id) == (GIB, "raw", facts.id)
    found = info(out / "disk")
    assert found["virtual-size"] == GIB
    assert found["backing-filename"] == str(scripted.mount / facts.base_name)
    assert found["backing-filename-format"] == "raw"
    assert found["cluster-size"] == 65536
    raw = out / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", out / "disk", raw], check=True)
    with raw.open("rb") as file:
        assert file.read(3 * MIB + 4096) == content + bytes(4096)
    raw.unlink()
    assert os.listdir(out) == ["disk"]


@pytest.mark.parametrize("cluster_size_bytes", [4096, 65536, 2 * MIB])
def test_overlay_takes_over_the_cluster_size(
    cluster_size_bytes: int, scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """On a base shown as qcow2 the overlay has its cluster size, as Nova's have, and its virtual size."""
    facts = scripted.add(qcow2(out / "q", "-o", f"cluster_size={cluster_size_bytes}"), "qcow2")
    result = create_overlay(client, facts.id, out / "disk")
    found = info(out / "disk")
    assert result.base_format == found["backing-filename-format"] == "qcow2"
    assert found["cluster-size"] == cluster_size_bytes
    assert found["virtual-size"] == 64 * MIB


def test_decoded_qcow2_is_a_raw_base(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """An image shown in the raw view is judged and named as raw."""
    facts = scripted.add(noise(MIB), "qcow2", presented_format="raw", view="raw", size_bytes=7)
    create_overlay(client, facts.id, out / "disk")
    assert info(out / "disk")["backing-filename-format"] == "raw"


def test_size_not_given_is_what_the_image_needs(
    scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """Without a size the disk has the image's, or min_disk if that is more."""
    small = scripted.add(noise(MIB), "raw")
    assert create_overlay(client, small.id, out / "a").size_bytes == MIB
    needs_more = scripted.add(noise(MIB), "raw", min_disk_gib=2)
    assert create_overlay(client, needs_more.id, out / "b").size_bytes == 2 * GIB


@pytest.mark.parametrize(
    ("disk_format", "min_disk_gib", "size_bytes"),
    [("raw", 0, MIB - 512), ("raw", 2, 2 * GIB - 1), ("qcow2", 0, 64 * MIB - 512)],
)
def test_too_small_is_refused(
    disk_format: str,
    min_disk_gib: int,
    size_bytes: int,
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
) -> None:
    """A disk smaller than the image's virtual size or min_disk is refused, naming what would do."""
    content = noise(MIB) if disk_format == "raw" else qcow2(out / "q")
    facts = scripted.add(content, disk_format, min_disk_gib=min_disk_gib)
    with pytest.raises(DestinationRefused, match=f"too few for image {facts.id}.*give at least"):
        create_overlay(client, facts.id, out / "disk", size_bytes=size_bytes)
    assert os.listdir(out) == []


def test_base_dir_replaces_the_mountpoint(
    scripted: ScriptedClient, client: ControlClient, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--base-dir says where the mount is, relative or not; the overlay names it in full."""
    facts = scripted.add(noise(MIB), "raw", mountpoint="/nowhere")
    monkeypatch.chdir(scripted.mount.parent)
    result = create_overlay(client, facts.id, Path(out / "disk"), base_dir=Path("_base"))
    assert result.base_path == scripted.mount / facts.base_name
    assert info(out / "disk")["backing-filename"] == str(result.base_path)


def test_use_is_noted_on_the_base(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """The base's mtime is now, or Nova's cache manager would think it unused."""
    facts = scripted.add(noise(MIB), "raw")
    path = scripted.mount / facts.base_name
    os.utime(path, (1000, 1000))
    create_overlay(client, facts.id, out / "disk")
    assert path.stat().st_mtime > 1_000_000_000


# ── what must not be ──


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("nowhere")])
def test_destination_that_exists_is_refused(
    make: Callable[[Path], None], scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """Whatever is at DEST stays, a dangling link included, and the daemon is not even asked."""
    make(out / "disk")
    with pytest.raises(DestinationRefused, match=r"disk: it exists"):
        create_overlay(client, "unknown", out / "disk")
    assert os.listdir(out) == ["disk"]
    assert not (out / "disk").is_file() or (out / "disk").stat().st_size == 0


def test_destination_that_appears_meanwhile_is_refused(
    scripted: ScriptedClient, client: ControlClient, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that takes the name while the overlay is made is not replaced."""
    facts = scripted.add(noise(MIB), "raw")
    real_sync = placement.sync

    def sync(path: Path) -> None:
        (out / "disk").write_text("theirs")
        real_sync(path)

    monkeypatch.setattr(placement, "sync", sync)
    with pytest.raises(DestinationRefused, match="it exists"):
        create_overlay(client, facts.id, out / "disk")
    assert (out / "disk").read_text() == "theirs"
    assert os.listdir(out) == ["disk"]


@pytest.mark.parametrize("dest", ["missing/disk", "file/disk"])
def test_destination_without_folder_is_refused(
    dest: str, scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """A folder that is not there is named before anything is asked or made."""
    (out / "file").touch()
    with pytest.raises(DestinationRefused, match=f"{dest}: No"):
        create_overlay(client, "unknown", out / dest)
    assert os.listdir(out) == ["file"]


def test_unknown_image_leaves_nothing(client: ControlClient, out: Path) -> None:
    """What the daemon raises is raised, and nothing is left behind."""
    with pytest.raises(ImageNotFound):
        create_overlay(client, "unknown", out / "disk")
    assert os.listdir(out) == []


def test_base_that_is_missing_is_named(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """Without a mount at --base-dir the error says so."""
    facts = scripted.add(noise(MIB), "raw")
    (scripted.mount / facts.base_name).unlink()
    with pytest.raises(MountFailed, match=f"{facts.base_name}: not there; mount lazyimg on"):
        create_overlay(client, facts.id, out / "disk")
    assert os.listdir(out) == []


def test_base_of_another_size_is_refused(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """A file that took the lazy one's place may be anything."""
    facts = scripted.add(noise(MIB), "raw")
    (scripted.mount / facts.base_name).write_bytes(noise(MIB + 1))
    with pytest.raises(MountFailed, match="the daemon presents 1048576"):
        create_overlay(client, facts.id, out / "disk")
    assert os.listdir(out) == []


def test_base_name_of_another_image_is_refused(
    scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """The base's name is sha1 of the id, whatever the answer says: no path leads out of the mount."""
    facts = scripted.add(noise(MIB), "raw")
    scripted.facts[facts.id] = replace(facts, base_name="../../etc/passwd")
    with pytest.raises(LazyImgError, match="the daemon calls it"):
        create_overlay(client, facts.id, out / "disk")


def test_mislabelled_base_is_refused(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """A qcow2 with a backing file never becomes a base, whether it calls itself raw or qcow2."""
    (out / "shadow").touch()
    content = qcow2(out / "q", "-b", str(out / "shadow"), "-F", "raw")
    (out / "shadow").unlink()
    for disk_format in ("raw", "qcow2"):
        facts = scripted.add(content, disk_format)
        with pytest.raises(ImageRefused, match=r"content is qcow2|backing_file"):
            create_overlay(client, facts.id, out / "disk")
    assert os.listdir(out) == []


def test_disagreement_with_the_daemon_is_refused(
    scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """[I8] qemu is told a format only if header and daemon agree on it."""
    facts = scripted.add(noise(MIB), "raw", presented_format="qcow2")
    with pytest.raises(ImageRefused, match="its content is raw, the daemon presents qcow2"):
        create_overlay(client, facts.id, out / "disk")


def test_failing_qemu_img_is_one_line(
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its complaint is in the message, on one line and bounded; the half-made file is gone."""
    facts = scripted.add(noise(MIB), "raw")
    script = 'echo "qemu-img: no\nluck" >&2; head -c 100000 /dev/zero | tr "\\0" x >&2; exit 1'
    with (
        fake_qemu_img(tmp_path / "bin", script, monkeypatch),
        pytest.raises(LazyImgError, match="qemu-img create: qemu-img: no luck xxx") as caught,
    ):
        create_overlay(client, facts.id, out / "disk")
    assert len(str(caught.value)) < 1000
    assert os.listdir(out) == []


def test_hanging_qemu_img_is_ended(
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It has a time limit; nothing of it is left running."""
    facts = scripted.add(noise(MIB), "raw")
    monkeypatch.setattr(qemuimg, "TIME_LIMIT_S", 0.2)
    with (
        fake_qemu_img(tmp_path / "bin", "exec sleep 1000", monkeypatch),
        pytest.raises(LazyImgError, match="no end in"),
    ):
        create_overlay(client, facts.id, out / "disk")
    assert os.listdir(out) == []


def test_qemu_img_is_limited(
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It runs with Nova's limits of address space (1 GiB) and CPU time (30 s)."""
    facts = scripted.add(noise(MIB), "raw")
    with (
        fake_qemu_img(tmp_path / "bin", "ulimit -v >&2; ulimit -t >&2; exit 1", monkeypatch),
        pytest.raises(LazyImgError, match="qemu-img create: 1048576 30;"),
    ):
        create_overlay(client, facts.id, out / "disk")


def test_missing_qemu_img_is_named(
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without qemu-img the error names the package."""
    facts = scripted.add(noise(MIB), "raw")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "prlimit").symlink_to(str(shutil.which("prlimit")))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(LazyImgError, match="qemu-img: not found on PATH; install qemu-utils"):
        create_overlay(client, facts.id, out / "disk")
    assert os.listdir(out) == []


# ── locks ──


def test_lock_is_the_one_nova_takes(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """It is <instances_path>/locks/nova-<base name>, folder and file owned as instances_path is."""
    if os.geteuid() != 0:
        pytest.skip("root is missing")
    instances = scripted.mount.parent
    os.chown(instances, 1234, 5678)
    facts = scripted.add(noise(MIB), "raw")
    create_overlay(client, facts.id, out / "disk")
    locks = instances / "locks"
    assert os.listdir(locks) == [f"nova-{facts.base_name}"]
    for path in (locks, locks / f"nova-{facts.base_name}"):
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 5678)


def test_lock_held_by_another_process_is_waited_for(
    scripted: ScriptedClient, client: ControlClient, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While another process holds it nothing is made; it ends in InUse, or goes on when the lock is free."""
    facts = scripted.add(noise(MIB), "raw")
    locks = scripted.mount.parent / "locks"
    locks.mkdir()
    script = (
        "import fasteners, sys; lock = fasteners.InterProcessLock(sys.argv[1]); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, locks / f"nova-{facts.base_name}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        monkeypatch.setattr(baselock, "LOCK_TIMEOUT_S", 0.1)
        with pytest.raises(InUse, match="another process has kept it"):
            create_overlay(client, facts.id, out / "disk")
        assert os.listdir(out) == []
        monkeypatch.setattr(baselock, "LOCK_TIMEOUT_S", 60.0)
        release = threading.Timer(0.1, holder.stdin.close)
        release.start()
        create_overlay(client, facts.id, out / "disk")
        release.join()
    assert os.listdir(out) == ["disk"]


def test_lock_that_cannot_be_made_is_named(
    scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """The error names the lock and who could take it."""
    facts = scripted.add(noise(MIB), "raw")
    (scripted.mount.parent / "locks").write_text("no folder")
    with pytest.raises(LazyImgError, match=r"lock .*: Not a directory; run as root or as the owner"):
        create_overlay(client, facts.id, out / "disk")
    assert os.listdir(out) == []
