"""Builds the demo's guest: Debian's cloud kernel, an initramfs, and an ext4 disk with some hundred MB.

Nothing is installed and no root is needed: two Debian packages are downloaded (apt checks their signatures)
and unpacked, and mkfs.ext4 fills the disk.  The result is kept and used again until `_RECIPE` changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lazyimg.demo.programs import require_programs, run_program
from lazyimg.demo.ramdisk import write_ramdisk
from lazyimg.errors import LazyImgError

# Part of the cache folder's name: raise it when anything below changes what is built.
_RECIPE = 1
_KERNEL_PACKAGE = "linux-image-cloud-amd64"
_PACKAGE_TIMEOUT_S = 300.0
_MKFS_TIMEOUT_S = 120.0

DISK_SIZE_BYTES = 2 << 30
# With the kernel package's 100 MB: some hundred MB that compression or zero detection cannot make small.
_BLOB_COUNT = 60
_BLOB_SIZE_BYTES = 4 << 20
# The guest reads every 12th file: about 29 MB, what a real Debian boot reads, 2 s of sha256 under TCG.
_CHECKED_EVERY = 12
# So that two builds give the same disk but for the inodes' change times, which nobody can set.
_FIXED_UUID = "6c617a79-696d-4167-8000-000000000001"
_FIXED_TIME_S = 1_700_000_000

# In the order they must be loaded.  Those a kernel has built in have no file and are left out.
_MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"),
    *("mbcache", "jbd2", "ext4"),
)

_RAMDISK_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t proc proc /proc
for module in /modules/*; do /bin/busybox insmod $module; done
tries=500
until [ -b /dev/vda ] || [ $((tries -= 1)) -eq 0 ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /disk
exec /bin/busybox switch_root /disk /sbin/init
"""

# Says its word only after reading the files, and after a write of its own has reached the disk.
_DISK_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
token=$(sed -n 's/.*lazyimg.token=\\([0-9a-f]*\\).*/\\1/p' /proc/cmdline)
result=failed
if sha256sum -c -s /etc/checked.sha256 && echo $token > /var/guest-was-here && sync; then
    bytes=$(cut -c 67- /etc/checked.sha256 | xargs stat -c %s | awk '{ n += $1 } END { print n }')
    result="ok kernel=$(uname -r) files=$(wc -l < /etc/checked.sha256) bytes=$bytes"
fi
echo "lazyimg-guest $token $result"
sync
mount -o remount,ro /
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """The three files a guest boots from, all read-only by agreement; `disk` is a sparse raw image."""

    kernel: Path
    ramdisk: Path
    disk: Path
    version: str

    @property
    def disk_size_bytes(self) -> int:
        """Bytes of the raw disk image, which is what a full download moves."""
        return self.disk.stat().st_size

    @property
    def disk_allocated_bytes(self) -> int:
        """Bytes of the disk image that are not holes."""
        return self.disk.stat().st_blocks * 512


def default_cache_dir() -> Path:
    """Return where the guest is kept between runs, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lazyimg" / "demo-guest"


def build_guest(cache_dir: Path, *, report: Callable[[str], None] = lambda line: None) -> Guest:
    """Return the guest in `cache_dir`, built now if it is not there; `report` is told what takes long.

    Several processes may call at once: one builds, the others wait for it.  A guest appears whole or not at
    all.  Raises LazyImgError naming the missing program, package or step.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _lock(cache_dir):
        guest = _find(cache_dir)
        if guest is None:
            require_programs("apt-get", "dpkg-deb", "mkfs.ext4")
            # The lock is ours, so whatever else is here was left by a killed build or an older recipe.
            for old in (*cache_dir.glob("building-*"), *cache_dir.glob("guest-r*")):
                shutil.rmtree(old)
            with tempfile.TemporaryDirectory(prefix="building-", dir=cache_dir) as folder:
                version = _build(Path(folder), report)
                (Path(folder) / "guest").rename(cache_dir / f"guest-r{_RECIPE}-{version}")
            guest = _find(cache_dir)
    assert guest is not None
    return guest


@contextmanager
def _lock(cache_dir: Path) -> Iterator[None]:
    # The wait ends: the holder has a deadline for each of its steps, and the kernel frees a dead one's lock.
    with (cache_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _find(cache_dir: Path) -> Guest | None:
    # A newer kernel in Debian is no reason to build again: a warm run needs no network.
    for folder in cache_dir.glob(f"guest-r{_RECIPE}-*"):
        version = folder.name.split("-", 2)[2]
        return Guest(folder / "kernel", folder / "ramdisk", folder / "disk.raw", version)
    return None


def _build(folder: Path, report: Callable[[str], None]) -> str:
    """Make folder/guest with kernel, ramdisk and disk.raw; return the kernel's version."""
    root, made = folder / "root", folder / "guest"
    made.mkdir()
    report("downloading Debian's cloud kernel")
    for package in _download(folder):
        run_program(["dpkg-deb", "-x", package, root], timeout_s=_PACKAGE_TIMEOUT_S)
    kernel = next((root / "boot").glob("vmlinuz-*"))
    shutil.copyfile(kernel, made / "kernel")
    _make_ramdisk(root, made / "ramdisk")
    report("filling the guest's disk")
    _fill_root(root)
    _make_disk(root, made / "disk.raw")
    for path in made.iterdir():
        path.chmod(0o444)
    return kernel.name.removeprefix("vmlinuz-")


def _download(folder: Path) -> list[Path]:
    """Download the kernel's and busybox's packages with apt's own signature checks, and return their files.

    The lists are fetched into this folder: the machine's own may be absent or stale, and need root to renew.
    """
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "archives" / "partial").mkdir(parents=True)
    # Sandbox: as root, apt would give up its rights and then could not write into our folder.
    options = [
        *("-q", "-o", f"Dir::State::Lists={folder}/lists", "-o", f"Dir::Cache={folder}"),
        *("-o", "APT::Sandbox::User=root", "-o", "Acquire::Languages=none"),
    ]
    run_program(["apt-get", "update", *options], timeout_s=_PACKAGE_TIMEOUT_S)
    # The package is an empty one that depends on the kernel of the day.  A source that apt cannot reach is
    # only a warning to it, and then a package is missing.
    try:
        shown = run_program(
            ["apt-cache", "show", "--no-all-versions", *options, _KERNEL_PACKAGE],
            timeout_s=_PACKAGE_TIMEOUT_S,
        )
    except LazyImgError as exc:
        raise LazyImgError(
            f"{_KERNEL_PACKAGE}: apt finds no such package; see that Debian's mirror is among its sources "
            "and can be reached (apt-get update)"
        ) from exc
    names = re.findall(r"^Depends:.*?(linux-image-\d\S*-cloud-amd64)", shown, re.MULTILINE)
    if not names:
        raise LazyImgError(f"{_KERNEL_PACKAGE}: depends on no kernel; this machine's apt sources are odd")
    run_program(
        ["apt-get", "download", *options, names[0], "busybox-static"],
        timeout_s=_PACKAGE_TIMEOUT_S,
        cwd=folder,
    )
    return sorted(folder.glob("*.deb"))


def _make_ramdisk(root: Path, path: Path) -> None:
    files = {"init": _RAMDISK_INIT.encode(), "bin/busybox": (root / "bin" / "busybox").read_bytes()}
    for place, name in enumerate(_MODULES):
        for module in root.glob(f"lib/modules/*/kernel/**/{name}.ko*"):
            content = module.read_bytes()
            # Debian 13 compresses them.
            unpacked = lzma.decompress(content) if module.suffix == ".xz" else content
            files[f"modules/{place:02}-{name}.ko"] = unpacked
    write_ramdisk(path, files, folders=("bin", "dev", "disk", "modules", "proc"))


def _fill_root(root: Path) -> None:
    """Add the guest's own files to the unpacked packages, with the list of what it is to check."""
    for name in ("dev", "etc", "proc", "sbin", "srv", "var"):
        (root / name).mkdir(exist_ok=True)
    init = root / "sbin" / "init"
    init.write_text(_DISK_INIT)
    init.chmod(0o755)
    for number in range(_BLOB_COUNT):
        blob = hashlib.shake_128(f"lazyimg demo blob {number}".encode()).digest(_BLOB_SIZE_BYTES)
        (root / "srv" / f"blob-{number:02}").write_bytes(blob)
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  /{path.relative_to(root)}\n" for path in files]
    (root / "etc" / "manifest.sha256").write_text("".join(sums))
    (root / "etc" / "checked.sha256").write_text("".join(sums[::_CHECKED_EVERY]))
    for path in root.rglob("*"):
        os.utime(path, (_FIXED_TIME_S, _FIXED_TIME_S), follow_symlinks=False)


def _make_disk(root: Path, path: Path) -> None:
    run_program(
        [
            *("mkfs.ext4", "-q", "-F", "-L", "lazyimg-demo", "-U", _FIXED_UUID),
            *(
                "-E",
                f"hash_seed={_FIXED_UUID},root_owner=0:0",
                "-d",
                root,
                path,
                str(DISK_SIZE_BYTES // 1024),
            ),
        ],
        timeout_s=_MKFS_TIMEOUT_S,
        # Fixed time stamps of the file system itself (e2fsprogs, lib/ext2fs/initialize.c).
        env={"E2FSPROGS_FAKE_TIME": str(_FIXED_TIME_S)},
    )
