"""The companion on a plain folder as the mount: real qemu-img, a scripted client, a control server once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from lazyimg.control import ControlClient, ImageFacts
from lazyimg.core.identity import base_name
from lazyimg.errors import (
    ConfigError,
    DestinationRefused,
    ImageNotFound,
    ImageRefused,
    InUse,
    LazyImgError,
    MountFailed,
)
from lazyimg.overlay import baselock, create_instance, create_overlay, fetch_plain, placement, qemuimg

MIB = 1 << 20
GIB = 1 << 30


class ScriptedClient:
    """Knows the images a test put into a folder that stands for the mount."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.facts: dict[str, ImageFacts] = {}

    def image_facts(self, image: str) -> ImageFacts:
        if image not in self.facts:
            raise ImageNotFound(f"image {image}: Glance has none; see openstack image list")
        return self.facts[image]

    def add(self, content: bytes, disk_format: str, **changes: Any) -> ImageFacts:
        image_id = str(uuid.uuid4())
        facts = ImageFacts(
            id=image_id,
            name="debian",
            base_name=base_name(image_id),
            disk_format=disk_format,
            container_format="bare",
            size_bytes=len(content),
            presented_size_bytes=len(content),
            presented_format="qcow2" if disk_format == "qcow2" else "raw",
            view="stored",
            mountpoint=str(self.mount),
            os_hash_algo="sha512",
            os_hash_value=hashlib.sha512(content).hexdigest(),
            checksum=hashlib.md5(content).hexdigest(),
        )
        facts = replace(facts, **changes)
        (self.mount / facts.base_name).write_bytes(content)
        self.facts[image_id] = facts
        return facts


@pytest.fixture
def scripted(tmp_path: Path) -> ScriptedClient:
    mount = tmp_path / "instances, all" / "_base"
    mount.mkdir(parents=True)
    return ScriptedClient(mount)


@pytest.fixture
def client(scripted: ScriptedClient) -> ControlClient:
    return cast(ControlClient, scripted)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder disks are made in; what is left in it is what was left behind."""
    folder = tmp_path / "out: here"
    folder.mkdir()
    return folder


@pytest.fixture(autouse=True)
def _needs_qemu_img(require: Callable[..., None]) -> None:
    require("qemu-img", "prlimit")


def noise(size_bytes: int) -> bytes:
    # Neither repeated nor, by chance, something with a signature.
    return b"noise" + os.urandom(size_bytes - 5)


def qcow2(path: Path, *options: str, size: str = "64M") -> bytes:
    path.unlink(missing_ok=True)
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(command, check=True)
    content = path.read_bytes()
    path.unlink()
    return content


def info(disk: Path) -> dict[str, Any]:
    command = ["qemu-img", "info", "--output=json", str(disk)]
    facts: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return facts


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


@contextmanager
def fake_qemu_img(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder.mkdir()
    (folder / "qemu-img").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "qemu-img").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield


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


# ── plain files ──


def test_plain_file_is_the_image(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """A kernel of several reads arrives byte by byte, verified by Glance's own hash."""
    content = noise(3 * MIB + 17)
    facts = scripted.add(content, "aki", container_format="aki")
    result = fetch_plain(client, facts.id, out / "kernel")
    assert (result.size_bytes, result.verified_by) == (len(content), "sha512")
    assert (out / "kernel").read_bytes() == content
    assert os.listdir(out) == ["kernel"]


@pytest.mark.parametrize(
    ("changes", "verified_by", "warnings"),
    [
        ({"os_hash_algo": None, "os_hash_value": None}, "md5", []),
        ({"os_hash_algo": "sha999"}, "md5", ["os_hash_algo sha999 is unknown here"]),
        ({"os_hash_value": None, "checksum": None}, "size", ["only its size is verified"]),
    ],
)
def test_plain_file_is_verified_by_what_there_is(
    changes: dict[str, str | None],
    verified_by: str,
    warnings: list[str],
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
    expected_warnings: Callable[..., None],
) -> None:
    """os_hash_value, else checksum, else the size with a warning."""
    expected_warnings(*warnings)
    facts = scripted.add(noise(MIB), "ari", **changes)
    assert fetch_plain(client, facts.id, out / "ramdisk").verified_by == verified_by


@pytest.mark.parametrize(
    "changes", [{"os_hash_value": "0" * 128}, {"os_hash_value": None, "checksum": "0" * 32}]
)
def test_plain_file_with_wrong_bytes_is_refused(
    changes: dict[str, str | None], scripted: ScriptedClient, client: ControlClient, out: Path
) -> None:
    """Bytes that are not Glance's never get the name."""
    facts = scripted.add(noise(MIB), "aki", **changes)
    with pytest.raises(ImageRefused, match="do not match Glance's"):
        fetch_plain(client, facts.id, out / "kernel")
    assert os.listdir(out) == []


def test_disk_is_no_kernel(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """A qcow2 image cannot be a plain file."""
    facts = scripted.add(qcow2(out / "q"), "qcow2")
    with pytest.raises(ImageRefused, match="is no kernel or ramdisk"):
        fetch_plain(client, facts.id, out / "kernel")


# ── instances ──


def test_instance_has_all_its_files(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """Disk, kernel and ramdisk by the image's own properties, and nothing else."""
    kernel, ramdisk = scripted.add(noise(MIB), "aki"), scripted.add(noise(MIB), "ari")
    image = scripted.add(
        noise(MIB), "raw", properties={"kernel_id": kernel.id, "ramdisk_id": ramdisk.id, "x": "y"}
    )
    result = create_instance(client, out / "vm", image=image.id, size_bytes=2 * MIB)
    assert sorted(os.listdir(out / "vm")) == ["disk", "kernel", "ramdisk"]
    assert (result.kernel, result.ramdisk, result.config_drive) == (
        out / "vm" / "kernel",
        out / "vm" / "ramdisk",
        None,
    )
    for made, facts in ((result.kernel, kernel), (result.ramdisk, ramdisk)):
        assert made is not None
        assert made.read_bytes() == (scripted.mount / facts.base_name).read_bytes()
    assert info(result.disk.path)["virtual-size"] == 2 * MIB


def test_ids_given_win_over_properties(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """--kernel-id replaces the image's; "nokernel" means none; into a folder that is there already."""
    kernel = scripted.add(noise(MIB), "aki")
    image = scripted.add(noise(MIB), "raw", properties={"kernel_id": "gone", "ramdisk_id": "nokernel"})
    result = create_instance(client, out, image=image.id, kernel_id=kernel.id)
    assert sorted(os.listdir(out)) == ["disk", "kernel"]
    assert result.ramdisk is None


def test_failed_instance_leaves_nothing(scripted: ScriptedClient, client: ControlClient, out: Path) -> None:
    """A ramdisk that fails takes disk, kernel and the new folder with it; an old folder stays as it was."""
    kernel, ramdisk = scripted.add(noise(MIB), "aki"), scripted.add(noise(MIB), "ari", os_hash_value="0")
    image = scripted.add(noise(MIB), "raw")
    (out / "old").mkdir()
    (out / "old" / "note").touch()
    for name in ("vm", "old"):
        with pytest.raises(ImageRefused, match="do not match"):
            create_instance(client, out / name, image=image.id, kernel_id=kernel.id, ramdisk_id=ramdisk.id)
    assert os.listdir(out) == ["old"]
    assert os.listdir(out / "old") == ["note"]


def test_instance_is_withdrawn_if_a_name_is_taken_at_the_end(
    scripted: ScriptedClient, client: ControlClient, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the last link fails, the ones before it are undone and the stranger's file stays."""
    kernel = scripted.add(noise(MIB), "aki")
    image = scripted.add(noise(MIB), "raw")
    real_sync = placement.sync

    def sync(path: Path) -> None:
        (out / "vm" / "kernel").write_text("theirs")
        real_sync(path)

    monkeypatch.setattr(placement, "sync", sync)
    with pytest.raises(DestinationRefused, match="kernel: it exists"):
        create_instance(client, out / "vm", image=image.id, kernel_id=kernel.id)
    assert os.listdir(out / "vm") == ["kernel"]
    assert (out / "vm" / "kernel").read_text() == "theirs"


@pytest.mark.parametrize(("target", "reason"), [("file", "not a folder"), ("no/vm", "No such file")])
def test_instance_folder_that_cannot_be_is_refused(
    target: str, reason: str, client: ControlClient, out: Path
) -> None:
    """The folder must be one, and its parent must be there."""
    (out / "file").touch()
    with pytest.raises(DestinationRefused, match=reason):
        create_instance(client, out / target, image="unknown")
    assert os.listdir(out) == ["file"]


# ── config drive ──


def config_tree(folder: Path) -> dict[str, bytes]:
    files = {
        "openstack/latest/meta_data.json": b'{"uuid": "x"}',
        "openstack/latest/user_data": b"#cloud-config\n",
        "openstack/2020-10-14/network_data.json": b"{}",
        "openstack/content/0000": noise(100_000),
        "ec2/latest/a name with.many.dots and ünï": b"",
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return files


def test_config_drive_has_the_tree_under_both_names(
    scripted: ScriptedClient, client: ControlClient, out: Path, tmp_path: Path
) -> None:
    """The ISO is labelled config-2 and has every file by its Joliet (Windows) and Rock Ridge (Linux) name."""
    import pycdlib

    files = config_tree(tmp_path / "tree")
    image = scripted.add(noise(MIB), "raw")
    result = create_instance(client, out / "vm", image=image.id, config_drive=tmp_path / "tree")
    assert result.config_drive == out / "vm" / "disk.config"
    # ECMA-119 §8.4: the primary volume descriptor is sector 16, its volume identifier at byte 40.
    assert result.config_drive.read_bytes()[16 * 2048 + 40 :][:32] == b"config-2".ljust(32)
    iso = pycdlib.PyCdlib()
    iso.open(str(result.config_drive))
    for name, content in files.items():
        for kind in ("joliet_path", "rr_path"):
            copy = out / "copy"
            iso.get_file_from_iso(str(copy), **{kind: f"/{name}"})
            assert copy.read_bytes() == content, (kind, name)
    iso.close()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda tree: (tree / "link").symlink_to("/etc/shadow"), "/link is neither file nor folder"),
        (lambda tree: os.mkfifo(tree / "fifo"), "/fifo is neither file nor folder"),
        (lambda tree: (tree / ("x" * 255)).touch(), "give shorter names"),
        (shutil.rmtree, "not a folder; give one"),
    ],
)
def test_config_drive_that_cannot_be_is_refused(
    spoil: Callable[[Path], None],
    reason: str,
    scripted: ScriptedClient,
    client: ControlClient,
    out: Path,
    tmp_path: Path,
) -> None:
    """Nothing that is neither file nor folder goes in, and the whole instance is withdrawn."""
    config_tree(tmp_path / "tree")
    spoil(tmp_path / "tree")
    image = scripted.add(noise(MIB), "raw")
    with pytest.raises(ConfigError, match=reason):
        create_instance(client, out / "vm", image=image.id, config_drive=tmp_path / "tree")
    assert os.listdir(out) == []


# ── interrupts ──

# A FIFO without a writer stands for a stalled mount: open() waits there.
STALLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_overlay import ScriptedClient
from lazyimg import cli
from lazyimg.overlay import base, create_instance
cli._exit_on_signals()
client = ScriptedClient(Path(sys.argv[2]))
facts = client.add(b"x" * 1000, "raw")
def stall(path):
    os.mkfifo(str(path) + ".stalled")
    print("stalled", flush=True)
    return open(str(path) + ".stalled", "rb").read()
base._read_head = stall
create_instance(client, Path(sys.argv[3]), image=facts.id)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_a_stalled_read_leaves_nothing(
    number: signal.Signals, scripted: ScriptedClient, out: Path
) -> None:
    """Ctrl-C, SIGTERM and SIGHUP end it at once though the mount does not answer; nothing is left behind."""
    command = [
        sys.executable,
        "-c",
        STALLED,
        str(Path(__file__).parent),
        str(scripted.mount),
        str(out / "vm"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"stalled\n"
        assert os.listdir(out) == ["vm"]
        began_s = time.monotonic()
        process.send_signal(number)
        process.wait(30)
        assert time.monotonic() - began_s < 5
    assert process.returncode in (-signal.SIGINT, 128 + number)
    assert os.listdir(out) == []


def test_signal_during_qemu_img_leaves_nothing(
    scripted: ScriptedClient, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM while qemu-img hangs ends both."""
    pid_file = tmp_path / "pid"
    os.mkfifo(pid_file)
    program = STALLED.replace("base._read_head = stall\n", "")
    with fake_qemu_img(tmp_path / "bin", f"echo $$ > {pid_file}; exec sleep 1000", monkeypatch):
        command = [
            sys.executable,
            "-c",
            program,
            str(Path(__file__).parent),
            str(scripted.mount),
            str(out / "vm"),
        ]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
            pid = int(pid_file.read_text())
            process.terminate()
            assert process.wait(30) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid}").exists()
    assert os.listdir(out) == []
