"""Images that Glance replaces, deletes or deactivates under guests that have them open, through a real mount."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from real_mount import Mount, read_direct, wait_until
from served_glance import MIB, ServedGlance, ServedImage, pattern

from lazyimg.errors import InUse

SIZE_BYTES = 8 * MIB
# The first MiB comes with the lookup.
ABSENT = 6 * MIB
BLOCK = 64 << 10


def state_of(mount: Mount, image: ServedImage) -> list[str]:
    return [one["state"] for one in mount.status()["images"] if one["id"] == image.id]


def read_fails(descriptor: int, start: int) -> None:
    with pytest.raises(OSError, match="Input/output") as caught:
        os.pread(descriptor, BLOCK, start)
    assert caught.value.errno == errno.EIO


def test_replaced_image_never_gives_the_others_bytes(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I1] Another image of the same size and id: the open one fails where bytes lack, a new open sees the other.

    1. A guest opens the image; its first MiB is here.
    2. Glance deletes it, and is given another of the same id and size.
    3. A read of absent bytes is refused by the answer's own checksum: EIO.  Present bytes are the old image's.
    4. Status shows it changed; the name leads to the new image, wholly right.
    5. The guest closes; the old image is gone from the cache.
    """
    image = glance.add(SIZE_BYTES)
    mount = make_mount(glance)
    guest = os.open(mount.path_of(image), os.O_RDONLY)
    try:
        assert os.pread(guest, BLOCK, 0) == image.content[:BLOCK]
        glance.delete(image)
        other = glance.add(pattern(999, SIZE_BYTES), id=image.id)
        assert other.id == image.id
        read_fails(guest, ABSENT)
        wait_until(lambda: state_of(mount, image) == ["changed"], "the state `changed`")
        old_inode = os.fstat(guest).st_ino
        # The kernel keeps a name for a second.
        wait_until(lambda: mount.path_of(other).stat().st_ino != old_inode, "another inode")
        assert read_direct(mount.path_of(other), ABSENT, BLOCK) == other.content[ABSENT : ABSENT + BLOCK]
        assert read_direct(mount.path_of(other), 0, BLOCK) == other.content[:BLOCK]
        assert os.pread(guest, BLOCK, 0) == image.content[:BLOCK]
        read_fails(guest, ABSENT)
        assert sorted(state_of(mount, image)) == ["changed", "lazy"]
    finally:
        os.close(guest)
    wait_until(lambda: state_of(mount, image) == ["lazy"], "the end of the old image")


def test_deleted_image_is_read_as_far_as_it_is_here(
    make_mount: Callable[..., Mount], glance: ServedGlance
) -> None:
    """[I7] Deleted under a guest: what is here is read on, the rest fails at once with the reason in status.

    1. A guest opens the image; its first MiB is here.
    2. Glance deletes it; a read of absent bytes asks the record, which is gone: EIO, in far less than the limit.
    3. Status says gone, at risk, and how much is missing; eviction is refused, before and after the last handle.
    """
    image = glance.add(SIZE_BYTES)
    mount = make_mount(glance)
    with mount.path_of(image).open("rb", buffering=0) as guest:
        assert os.pread(guest.fileno(), BLOCK, 0) == image.content[:BLOCK]
        glance.delete(image)
        read_fails(guest.fileno(), ABSENT)
        wait_until(lambda: state_of(mount, image) == ["gone"], "the state `gone`")
        shown = mount.status_of(image)
        assert (shown["at_risk"], 0 < shown["missing_bytes"] < SIZE_BYTES) == (True, True)
        assert "kept and read on" in shown["reason"]
        assert os.pread(guest.fileno(), BLOCK, 0) == image.content[:BLOCK]
    with pytest.raises(Exception, match="kept, Glance no longer has it"):
        mount.client().evict(image.id)
    assert read_direct(mount.path_of(image), 0, BLOCK) == image.content[:BLOCK]


def test_deactivated_image_is_waited_for(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """Deactivated under a guest: its read waits, visibly, and ends with the right bytes on reactivation.

    1. A guest opens the image; its first MiB is here.
    2. Glance deactivates it: the record says so, its bytes are refused.  A read of absent bytes waits.
    3. Status says deactivated.  Glance reactivates it: the read ends.
    """
    image = glance.add(SIZE_BYTES)
    mount = make_mount(glance)
    with mount.path_of(image).open("rb", buffering=0) as guest:
        assert os.pread(guest.fileno(), BLOCK, 0) == image.content[:BLOCK]
        glance.act(image, "deactivate")
        reading = mount.read_later(image, ABSENT, BLOCK)
        wait_until(lambda: state_of(mount, image) == ["deactivated"], "the state `deactivated`")
        assert not reading.done()
        glance.act(image, "reactivate")
        assert reading.result(30) == image.content[ABSENT : ABSENT + BLOCK]


def test_image_that_is_not_what_glance_says_is_quarantined(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I1] Whole and not of the hash that Glance states: every read is EIO, also of pages that the kernel kept.

    1. Glance's store holds other bytes than those it took the hash of.
    2. A guest reads some of them through the page cache, and the image becomes whole.
    3. The hash differs: status says quarantined and why; buffered and direct reads are EIO.
    4. The next daemon says the same.  Eviction is refused while the guest is there, then ends the quarantine.
    """
    glance = make_glance()
    image = glance.add(2 * MIB)
    glance.damage(image, MIB)
    mount = make_mount(glance)
    with mount.path_of(image).open("rb", buffering=0) as guest:
        assert os.pread(guest.fileno(), BLOCK, 0) == image.content[:BLOCK]
        mount.fetch_all(image)
        wait_until(lambda: state_of(mount, image) == ["quarantined"], "the quarantine")
        shown = mount.status_of(image)
        assert (shown["source_hash"], "not what Glance's sha512 says" in shown["reason"]) == (
            "mismatch",
            True,
        )
        wait_until(lambda: _fails(guest.fileno(), 0), "the end of the kernel's pages")
        with pytest.raises(OSError, match="Input/output"):
            read_direct(mount.path_of(image), 0, BLOCK)
        with pytest.raises(InUse):
            mount.client().evict(image.id)
    assert mount.stop() == 0
    mount.start()
    assert state_of(mount, image) == ["quarantined"]
    with pytest.raises(OSError, match="Input/output"):
        read_direct(mount.path_of(image), 0, BLOCK)
    glance.damage(image, MIB)
    assert mount.client().evict(image.id) > 0
    assert read_direct(mount.path_of(image), MIB, BLOCK) == image.content[MIB : MIB + BLOCK]


def _fails(descriptor: int, start: int) -> bool:
    try:
        os.pread(descriptor, BLOCK, start)
    except OSError:
        return True
    return False


def test_whole_image_is_verified_and_stays_so(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """A whole image is compared with its hash by itself, and a restart does not take that back."""
    image = glance.add(2 * MIB)
    mount = make_mount(glance)
    mount.path_of(image).stat()
    assert mount.status_of(image)["source_hash"] == "unchecked"
    mount.fetch_all(image)
    wait_until(lambda: mount.status_of(image)["source_hash"] == "match", "the comparison")
    mount.stop()
    mount.start()
    assert mount.status_of(image)["source_hash"] == "match"
