"""Every way Glance can fail, seen through a real mount: a reader waits, and reads the image's bytes.

Expected each time:

    short body, reset, stall        what arrived is kept, the rest is asked again
    204, 500, 503, 429, 401         asked again, after Retry-After (seconds or a date) where it is short
    redirect, wherever to           asked again where it was, never followed
    whole body as 200 or 206        asked again; three in a row: the image is read as a stream
    wrong Content-Range             asked again, no byte of it is used
    400 "not supported"             the image is read as a stream
    away                            waits until it is back, or `read_timeout`: EIO, and the next read tries again
    deactivated                     waits until it is reactivated, or `read_timeout`
    deleted                         what is here is read on, the rest is EIO at once
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from real_mount import Mount, mounts, read_direct, wait_until
from served_glance import MIB, ServedGlance

from lazyimg.demo.faults import FaultRule

pytestmark = pytest.mark.slow

AWAY = "http://127.0.0.1:1/"
FAULTS: dict[str, dict[str, Any]] = {
    "short body": {"action": "short_body", "bytes": 100_000},
    "empty body": {"action": "short_body", "bytes": 0},
    "stall at once": {"action": "stall", "bytes": 0, "seconds": 600},
    "stall within": {"action": "stall", "bytes": 70_000, "seconds": 600},
    "204": {"action": "empty_204"},
    "200 with everything": {"action": "whole_body"},
    "206 with everything": {"action": "whole_body", "status": 206},
    "wrong Content-Range": {"action": "wrong_content_range"},
    "reset": {"action": "reset"},
    "500": {"action": "status", "status": 500},
    "503": {"action": "status", "status": 503, "headers": {"Retry-After": "1"}},
    "503 until next year": {"action": "status", "status": 503, "headers": {"Retry-After": "31536000"}},
    "401": {"action": "status", "status": 401},
    "403": {"action": "status", "status": 403},
    "404": {"action": "status", "status": 404},
    "429": {"action": "status", "status": 429},
    "429 until a date": {
        "action": "status",
        "status": 429,
        "headers": {"Retry-After": "Fri, 31 Dec 2099 23:59:59 GMT"},
    },
    "redirect": {"action": "redirect", "location": AWAY},
    "redirect to itself": {"action": "redirect", "location": "/v2/images"},
}


@pytest.fixture(scope="module")
def impatient(_shared_glance: ServedGlance, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mount]:
    """A mount that takes a silence of a second for a fault, and retries soon."""
    with mounts() as made:
        yield made.make(
            tmp_path_factory.mktemp("impatient"),
            _shared_glance.url,
            first_byte_timeout=1,
            between_bytes_timeout=1,
            retry_pause_max=0.5,
        )


def is_decided(path: Path) -> bool:
    """False while the name is undecided; a name that is taken for absent is an error."""
    try:
        path.stat()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("fault", FAULTS)
def test_passing_fault_only_delays(fault: str, impatient: Mount, glance: ServedGlance) -> None:
    """[I1] The first two requests for bytes fail, in each way there is; the reader gets the image's bytes."""
    image = glance.add(2 * MIB + 333)
    path = impatient.path_of(image)
    path.stat()
    asked = len(glance.data_requests(image))
    glance.fail(FaultRule(kind="data", image_id=image.id, count=2, **FAULTS[fault]))
    assert path.read_bytes() == image.content
    assert len(glance.data_requests(image)) >= asked + 3
    said = impatient.status_of(image)
    assert said["retries"] >= 1
    assert said["last_error"] is not None
    assert said["source"] == "ranges"


@pytest.mark.parametrize("fault", ["short body", "204", "500", "reset", "stall at once"])
def test_fault_while_a_name_is_decided(fault: str, impatient: Mount, glance: ServedGlance) -> None:
    """[I8] Faults while the header is fetched delay a name or leave it undecided; it is never taken for absent."""
    image = glance.add(MIB + 99)
    glance.fail(FaultRule(kind="data", image_id=image.id, count=3, **FAULTS[fault]))
    path = impatient.path_of(image)
    wait_until(lambda: is_decided(path), "the name", 30)
    assert path.read_bytes() == image.content


@pytest.mark.parametrize("fault", ["500", "reset", "401", "redirect"])
def test_fault_of_records_and_lists(fault: str, impatient: Mount, glance: ServedGlance) -> None:
    """[I6] Faults of records and lists leave a name undecided, not absent, and it is found when they are over."""
    image = glance.add(100_000)
    action = FAULTS[fault]
    glance.fail(*(FaultRule(kind=kind, count=3, **action) for kind in ("list", "record")))
    path = impatient.path_of(image)
    wait_until(lambda: is_decided(path), "the name", 30)
    assert path.read_bytes() == image.content


def test_reader_waits_through_an_outage(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I1] Glance goes away while readers wait, and comes back: each of them reads the image's bytes."""
    glance = make_glance()
    image = glance.add(16 * MIB)
    mount = make_mount(glance)
    path = mount.path_of(image)
    assert read_direct(path, 0, MIB) == image.content[:MIB]
    glance.stop()
    starts = range(2 * MIB, 16 * MIB, 2 * MIB)
    reads = [mount.read_later(image, start, MIB) for start in starts]
    wait_until(lambda: mount.status()["glance"]["is_down"], "the breaker")
    (endpoint,) = mount.status()["glance"]["endpoints"]
    assert endpoint["endpoint"] == glance.url
    assert endpoint["state"] in ("open", "half-open")
    assert "ConnectError" in endpoint["last_error"]
    assert not any(read.done() for read in reads)
    assert read_direct(path, 0, MIB) == image.content[:MIB], "what is here is read meanwhile"
    glance.start()
    for start, read in zip(starts, reads, strict=True):
        assert read.result(60) == image.content[start : start + MIB]
    assert not mount.status()["glance"]["is_down"]


def test_outage_ends_by_itself_while_nobody_reads(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I6] While Glance is known to be down a lookup is answered at once; a probe that nobody asked for ends that."""
    glance = make_glance()
    image = glance.add(MIB)
    mount = make_mount(glance)
    glance.stop()
    path = mount.path_of(image)
    wait_until(lambda: not is_decided(path) and mount.status()["glance"]["is_down"], "the breaker")
    glance.start()
    wait_until(lambda: not mount.status()["glance"]["is_down"], "a probe", 20)
    wait_until(lambda: is_decided(path), "the name", 20)
    assert path.read_bytes() == image.content


def test_another_endpoint_is_good(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance], tmp_path: Path
) -> None:
    """[I1] The first endpoint goes away: the second serves its readers, and the first is used when it is back."""
    first = make_glance()
    image = first.add(32 * MIB)
    # The same images behind another port.
    second = ServedGlance(tmp_path / "glance0")
    try:
        mount = make_mount(f"{first.url} {second.url}")
        assert read_direct(mount.path_of(image), 0, MIB) == image.content[:MIB]
        first.stop()
        for start in range(2 * MIB, 8 * MIB, MIB):
            assert mount.read_later(image, start, MIB).result(10) == image.content[start : start + MIB]
        said = mount.status()["glance"]
        assert not said["is_down"]
        assert said["endpoints"][0]["state"] in ("open", "half-open")
        assert said["endpoints"][1]["state"] == "closed"
        first.start()
        wait_until(lambda: mount.status()["glance"]["endpoints"][0]["state"] == "closed", "a probe", 30)
        asked = len(first.data_requests(image))
        assert read_direct(mount.path_of(image), 30 * MIB, MIB) == image.content[30 * MIB : 31 * MIB]
        assert len(first.data_requests(image)) > asked
    finally:
        second.stop()


def test_read_over_its_limit_fails_and_the_next_tries_again(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I5] After `read_timeout` a read is EIO, a guest can live with that, and the next one tries again."""
    glance = make_glance()
    image = glance.add(4 * MIB)
    mount = make_mount(glance, read_timeout=1)
    path = mount.path_of(image)
    path.stat()
    glance.stop()
    start = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        read_direct(path, 2 * MIB, 4096)
    assert 0.9 < time.monotonic() - start < 20
    glance.start()
    assert read_direct(path, 2 * MIB, 4096) == image.content[2 * MIB :][:4096]
    assert path.read_bytes() == image.content


def test_store_without_ranges_is_streamed(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance]
) -> None:
    """[I1] From a store that refuses ranges images are read as one stream, right and once; status says so."""
    glance = make_glance("--no-ranges")
    image = glance.add(12 * MIB + 21)
    mount = make_mount(glance)
    path = mount.path_of(image)
    path.stat()
    reads = {start: mount.read_later(image, start, MIB) for start in range(11 * MIB, 0, -2 * MIB)}
    for start, read in reads.items():
        assert read.result(60) == image.content[start : start + MIB]
    assert path.read_bytes() == image.content
    said = mount.status_of(image)
    assert (said["source"], said["state"]) == ("stream", "whole")
    # One range that was refused, one stream for the header, one to the end.
    assert len(glance.data_requests(image)) <= 4


def test_whole_bodies_again_and_again_become_a_stream(impatient: Mount, glance: ServedGlance) -> None:
    """[I1] A Glance that answers each range with everything is read as a stream after the third time."""
    image = glance.add(3 * MIB + 1)
    glance.fail(FaultRule("whole_body", image_id=image.id, status=206))
    path = impatient.path_of(image)
    wait_until(lambda: is_decided(path), "the name", 30)
    assert path.read_bytes() == image.content
    assert impatient.status_of(image)["source"] == "stream"


def test_image_deleted_while_in_use(impatient: Mount, glance: ServedGlance) -> None:
    """[I7] Of an image deleted while it is open, present bytes are read on; the others are EIO at once."""
    image = glance.add(8 * MIB)
    path = impatient.path_of(image)
    with path.open("rb"):
        assert read_direct(path, 3 * MIB, MIB) == image.content[3 * MIB : 4 * MIB]
        glance.delete(image)
        start = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            read_direct(path, 7 * MIB, 4096)
        assert time.monotonic() - start < 20
        assert read_direct(path, 3 * MIB, MIB) == image.content[3 * MIB : 4 * MIB]
        assert read_direct(path, 0, MIB) == image.content[:MIB]


def test_deactivated_while_in_use(impatient: Mount, glance: ServedGlance) -> None:
    """[I1] Bytes of a deactivated image are refused, its record is not: a reader waits, and reads it reactivated."""
    image = glance.add(8 * MIB)
    path = impatient.path_of(image)
    with path.open("rb"):
        glance.act(image, "deactivate")
        read = impatient.read_later(image, 6 * MIB, 4096)
        wait_until(lambda: impatient.status_of(image)["retries"] >= 2, "refusals", 30)
        assert "deactivated in Glance" in impatient.status_of(image)["last_error"]
        assert not read.done()
        glance.act(image, "reactivate")
        assert read.result(30) == image.content[6 * MIB :][:4096]
