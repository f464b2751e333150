"""The unit and the example configuration that packagers install."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from lazyimg.config import Config, load_config
from lazyimg.daemon.fdstore import OWN_FDS
from lazyimg.daemon.handover import KEPT

SYSTEMD = Path(__file__).parents[2] / "systemd"
UNIT = SYSTEMD / "lazyimg.service"

# systemd.exec(5) of 252 to 257 and exec_needs_mount_namespace() in systemd's core: what gives a unit's
# processes a mount namespace of their own, in which they would mount unseen by qemu.
MOUNT_NAMESPACE = {
    "BindLogSockets", "BindPaths", "BindReadOnlyPaths", "DynamicUser", "ExecPaths",
    "ExtensionDirectories", "ExtensionImages", "IPCNamespacePath", "InaccessibleDirectories",
    "InaccessiblePaths", "LogNamespace", "MountAPIVFS", "MountFlags", "MountImages",
    "NetworkNamespacePath", "NoExecPaths", "PrivateBPF", "PrivateDevices", "PrivateIPC", "PrivateMounts",
    "PrivateNetwork", "PrivatePIDs", "PrivateTmp", "PrivateUsers", "ProcSubset", "ProtectControlGroups",
    "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules",
    "ProtectKernelTunables", "ProtectProc", "ProtectSystem", "ReadOnlyDirectories", "ReadOnlyPaths",
    "ReadWriteDirectories", "ReadWritePaths", "RootDirectory", "RootEphemeral", "RootHash", "RootImage",
    "RootVerity", "TemporaryFileSystem",
}  # fmt: skip
# Credentials are mounted for the unit alone; the device directives would take /dev/fuse away.
NOT_FOR_A_MOUNT = {
    "DeviceAllow", "DevicePolicy", "ImportCredential", "LoadCredential", "LoadCredentialEncrypted",
    "ProtectClock", "SetCredential", "SetCredentialEncrypted",
}  # fmt: skip


def _directives() -> dict[str, list[str]]:
    """Return the unit's directives; one given several times has all its values."""
    found = defaultdict(list)
    for line in UNIT.read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found[match[1]].append(match[2])
    return found


def test_unit_makes_no_mount_namespace() -> None:
    """No directive hides the mount from qemu or /dev/fuse from the daemon."""
    assert not set(_directives()) & (MOUNT_NAMESPACE | NOT_FOR_A_MOUNT)


def test_unit_has_no_directive_named_like_a_sandbox() -> None:
    """A sandboxing directive younger than our list is caught by its name."""
    sandboxed = r"Private|Protect|Root|Bind|Mount|ReadOnly|ReadWrite|Temp|Restrict"
    assert not [name for name in _directives() if re.match(sandboxed, name)]


def test_unit_orders_guests_inside_the_life_of_the_mount() -> None:
    """The mount is there before what reads from it starts, and stays until it has stopped."""
    before = set(_directives()["Before"][0].split())
    assert before == {
        "nova-compute.service",
        "libvirtd.service",
        "virtqemud.service",
        "libvirt-guests.service",
        "machine.slice",
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "all"),
        ("KillMode", "process"),
        ("Restart", "always"),
        ("StartLimitIntervalSec", "0"),
        ("SendSIGKILL", "no"),
        ("OOMScoreAdjust", "-900"),
        ("OOMPolicy", "continue"),
        ("After", "network-online.target"),
        ("Wants", "network-online.target"),
        ("RuntimeDirectory", "lazyimg"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("StateDirectory", "lazyimg"),
        ("StateDirectoryMode", "0700"),
    ],
)
def test_unit_keeps_the_mount_alive(name: str, value: str) -> None:
    """A stop, a restart or a lack of memory kills no process that serves guests."""
    assert _directives()[name] == [value]


def test_unit_has_no_capability_to_spare() -> None:
    """What a mount does not take is not there; tests/mount/test_capabilities.py runs with exactly these."""
    (capabilities,) = _directives()["CapabilityBoundingSet"]
    assert set(capabilities.split()) == {
        "CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_FOWNER", "CAP_FSETID", "CAP_DAC_OVERRIDE",
        "CAP_SYS_PTRACE",
    }  # fmt: skip


def test_unit_keeps_every_open_file() -> None:
    """[I9] systemd's store takes as many descriptors as the daemon may have open, and no exit code empties it."""
    found = _directives()
    assert int(found["FileDescriptorStoreMax"][0]) >= int(found["LimitNOFILE"][0]) - OWN_FDS + len(KEPT) + 1
    assert "RestartPreventExitStatus" not in found


def test_unit_passes_systemd_analyze(tmp_path: Path, require: Callable[..., None]) -> None:
    """`systemd-analyze verify` has nothing to say of the unit."""
    require("systemd-analyze")
    # The program is not installed in /usr/bin here; anything executable stands in for it.
    unit = UNIT.read_text().replace(
        "ExecStart=/usr/bin/lazyimg ", f"ExecStart={os.path.realpath(sys.executable)} "
    )
    (tmp_path / UNIT.name).write_text(unit)
    command = ["systemd-analyze", "verify", "--recursive-errors=no", str(tmp_path / UNIT.name)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, [line for line in result.stderr.splitlines() if "lazyimg" in line]) == (0, [])


def _example(*, uncommented: bool) -> str:
    text = (SYSTEMD / "lazyimg.toml").read_text()
    return re.sub(r"^#(?=[a-z_]+ = )", "", text, flags=re.MULTILINE) if uncommented else text


def test_example_config_changes_nothing_as_it_is(tmp_path: Path) -> None:
    """Installed untouched, the example is the default configuration."""
    path = tmp_path / "lazyimg.toml"
    path.write_text(_example(uncommented=False))
    assert load_config(path, environ={}) == Config()


def test_example_config_shows_every_key_with_its_default(tmp_path: Path) -> None:
    """With every line uncommented it loads, names every key, and only keys without a default differ."""
    path = tmp_path / "lazyimg.toml"
    path.write_text(_example(uncommented=True))
    config = load_config(path, environ={})
    assert config.model_fields_set == set(Config.model_fields)
    default = Config()
    for key in Config.model_fields:
        if getattr(default, key) is not None:
            assert getattr(config, key) == getattr(default, key), key
