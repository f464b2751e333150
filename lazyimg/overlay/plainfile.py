"""A kernel or ramdisk: an image's bytes copied out of the mount and verified, as Nova's fetch_raw_image."""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from lazyimg.control import ControlClient, ImageFacts
from lazyimg.errors import ImageRefused
from lazyimg.overlay.base import judge_base, locate, read_all, touch
from lazyimg.overlay.baselock import base_lock
from lazyimg.overlay.placement import Placement, refusing

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlainFileResult:
    """A file that was made; verified_by is the hash's name, or "size" where Glance has no hash."""

    path: Path
    size_bytes: int
    image_id: str
    verified_by: str


def fetch_plain(
    client: ControlClient, image: str, dest: Path, *, base_dir: Path | None = None
) -> PlainFileResult:
    """Copy an image (id or unique name) to a plain file `dest`, verified against Glance's hash.

    Raises DestinationRefused if `dest` exists, ImageRefused if the bytes are not Glance's, and what the
    daemon raises; nothing is left behind then.
    """
    dest = Path(os.path.abspath(dest))
    with Placement() as placement:
        hidden = placement.stage(dest)
        result = stage_plain(hidden, dest, client.image_facts(image), base_dir)
        placement.commit()
    return result


def stage_plain(hidden: Path, dest: Path, facts: ImageFacts, base_dir: Path | None) -> PlainFileResult:
    """Make the file at `hidden`, which is to appear at `dest`."""
    base_path = locate(facts, base_dir)
    if facts.presented_size_bytes != facts.size_bytes or facts.disk_format == "qcow2":
        raise ImageRefused(
            f"image {facts.id}: a {facts.disk_format} disk is no kernel or ramdisk; give another"
        )
    with base_lock(base_path):
        base = judge_base(facts, base_path)
        touch(base)
        verified_by, digest, expected = _expected_digest(facts)
        copied_bytes = 0
        with refusing(dest), hidden.open("wb") as file:
            for data in read_all(base_path):
                digest.update(data)
                file.write(data)
                copied_bytes += len(data)
    if copied_bytes != facts.size_bytes:
        raise ImageRefused(
            f"image {facts.id}: {copied_bytes} of {facts.size_bytes} bytes read; run lazyimg verify"
        )
    if expected is not None and digest.hexdigest() != expected:
        raise ImageRefused(
            f"image {facts.id}: its bytes do not match Glance's {verified_by}; run lazyimg verify {facts.id}"
        )
    return PlainFileResult(dest, copied_bytes, facts.id, verified_by)


def _expected_digest(facts: ImageFacts) -> tuple[str, hashlib._Hash, str | None]:
    """Return name and state of the hash to compute, and the hex digest it must come to if Glance has one."""
    if facts.os_hash_algo and facts.os_hash_value:
        try:
            return facts.os_hash_algo, hashlib.new(facts.os_hash_algo), facts.os_hash_value.lower()
        except ValueError:
            log.warning("image %s: os_hash_algo %s is unknown here", facts.id, facts.os_hash_algo)
    if facts.checksum:
        return "md5", hashlib.md5(usedforsecurity=False), facts.checksum.lower()
    log.warning("image %s: Glance has no hash of it; only its size is verified", facts.id)
    return "size", hashlib.sha512(), None
