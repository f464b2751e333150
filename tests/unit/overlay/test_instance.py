"""The companion's plain files, instances and config drives: whole or not at all, interrupts included."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_mount import MIB, ScriptedClient, fake_qemu_img, info, noise, qcow2

from lazyimg.control import ControlClient
from lazyimg.errors import (
    ConfigError,
    DestinationRefused,
    ImageRefused,
)
from lazyimg.overlay import create_instance, fetch_plain, placement

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
from scripted_mount import ScriptedClient
from lazyimg.cli.app import exit_on_signals
from lazyimg.overlay import base, create_instance
exit_on_signals()
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
