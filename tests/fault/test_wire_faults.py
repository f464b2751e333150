"""What lies between us and Glance fails: certificates, names, servers that vanish without a word.

Expected of each, at the client and through a mount:

    expired, wrong host, unknown authority    no byte is sent, the reason is told, retried: renewed, it works
    client certificate missing                as a connection that the server ends
    name unresolvable                         a passing fault; resolvable again, it works
    accept, then silence                      given up after `first_byte_timeout`, then one probe at a time
    kept connections silent for ever          each is given up once, new ones are made
    a body silent for ever                    what came is kept, the rest is asked again after `between_bytes_timeout`
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
import trio
from certificates import Authority
from real_mount import Mount, read_direct, wait_until
from served_glance import MIB, ServedGlance
from wire import Wire, wire

from lazyimg.core.identity import ImageRecord
from lazyimg.demo.faults import FaultRule
from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.errors import GlanceUnavailable
from lazyimg.glance.auth import NoAuth
from lazyimg.glance.client import GlanceClient
from lazyimg.glance.tls import Tls

pytestmark = pytest.mark.slow


def make_client(url: str, tls: Tls | None = None, silence_s: float = 1) -> GlanceClient:
    return GlanceClient(
        NoAuth([url], tls),
        connect_timeout_s=1,
        first_byte_timeout_s=silence_s,
        between_bytes_timeout_s=1,
        connections_max=4,
    )


@pytest.fixture
async def served(tmp_path: Path, nursery: trio.Nursery) -> tuple[ImageRecord, int]:
    """An image, and the port of the Glance that has it."""
    glance = EmbeddedGlance(tmp_path / "glance")
    record = glance.add_image(b"the image")
    url = await nursery.start(partial(serve, glance))
    return record, int(url.rpartition(":")[2])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.mark.parametrize(
    ("address", "days_left", "is_ours", "reason"),
    [
        ("127.0.0.1", -1, True, "certificate has expired"),
        ("127.0.0.2", 1, True, "not valid for '127.0.0.1'"),
        ("127.0.0.1", 1, False, "self-signed certificate|unable to get local issuer"),
    ],
)
async def test_certificate_that_does_not_hold_is_told_and_its_renewal_works(
    served: tuple[ImageRecord, int],
    authority: Authority,
    tmp_path: Path,
    address: str,
    days_left: int,
    is_ours: bool,
    reason: str,
) -> None:
    """Nothing is asked of a server that cannot prove who it is; the same client goes on when it can."""
    record, port = served
    signer = authority if is_ours else Authority(tmp_path / "stranger")
    bad = signer.server_context(signer.sign(address, days_left=days_left))
    with wire(port, bad) as line:
        async with aclosing(make_client(line.url, Tls(str(authority.ca_file)))) as client:
            with pytest.raises(GlanceUnavailable, match=reason):
                await client.image(record.id)
            line.tls = authority.server_context(authority.sign())
            assert await client.image(record.id) == record


async def test_authority_that_was_exchanged_is_read_again(
    served: tuple[ImageRecord, int], authority: Authority, tmp_path: Path
) -> None:
    """The file of authorities changes while we run: one failed handshake, no restart."""
    record, port = served
    ca_file = tmp_path / "ca.pem"
    ca_file.write_bytes(Authority(tmp_path / "old").ca_file.read_bytes())
    with wire(port, authority.server_context(authority.sign())) as line:
        async with aclosing(make_client(line.url, Tls(str(ca_file)))) as client:
            ca_file.write_bytes(authority.ca_file.read_bytes())
            with pytest.raises(GlanceUnavailable, match="CERTIFICATE_VERIFY_FAILED"):
                await client.image(record.id)
            assert await client.image(record.id) == record


async def test_server_that_asks_who_we_are(served: tuple[ImageRecord, int], authority: Authority) -> None:
    """With our certificate it answers, without it ends the connection."""
    record, port = served
    ours = authority.sign()
    with wire(port, authority.server_context(authority.sign(), asks_clients=True)) as line:
        async with aclosing(make_client(line.url, Tls(str(authority.ca_file)))) as client:
            with pytest.raises(GlanceUnavailable):
                await client.image(record.id)
        tls = Tls(str(authority.ca_file), [str(ours.cert_file), str(ours.key_file)])
        async with aclosing(make_client(line.url, tls)) as client:
            assert await client.image(record.id) == record


class Names(trio.abc.HostnameResolver):
    """Knows one name, or not."""

    def __init__(self) -> None:
        self.is_known = False

    async def getaddrinfo(self, host: object, port: object, *_: object, **__: object) -> list[object]:  # type: ignore[override]
        assert host in ("glance.test", b"glance.test")
        if not self.is_known:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    async def getnameinfo(self, *_: object) -> tuple[str, str]:  # type: ignore[override]
        raise AssertionError("nobody asks")


async def test_name_that_cannot_be_resolved_is_a_passing_fault(served: tuple[ImageRecord, int]) -> None:
    """DNS is gone: told so; DNS is back: the same client works."""
    record, port = served
    names = Names()
    trio.socket.set_custom_hostname_resolver(names)
    async with aclosing(make_client(f"http://glance.test:{port}")) as client:
        with pytest.raises(GlanceUnavailable, match=r"glance\.test.*name resolution"):
            await client.image(record.id)
        names.is_known = True
        assert await client.image(record.id) == record


async def test_kept_connections_of_a_vanished_server_cost_one_timeout(
    served: tuple[ImageRecord, int], expected_warnings: Callable[..., None]
) -> None:
    """All that were kept are silent for ever: they are given up together, and new ones made."""
    expected_warnings("no Glance answers")
    record, port = served
    with wire(port) as line:
        async with aclosing(make_client(line.url)) as client:
            async with trio.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(client.image, record.id)
            line.vanish()
            line.come_back()
            failed: list[float] = []
            began_at = trio.current_time()

            async def fail() -> None:
                with pytest.raises(GlanceUnavailable, match="no answer in 2 s"):
                    await client.image(record.id)
                failed.append(trio.current_time() - began_at)

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(fail)
            assert max(failed) < 10
            made_before = line.accepted
            with trio.fail_after(10):
                # The breaker may want its pause first.
                while client.is_down:
                    await trio.sleep(0.1)
                    await _try(client, record)
            assert line.accepted > made_before


async def _try(client: GlanceClient, record: ImageRecord) -> None:
    try:
        assert await client.image(record.id) == record
    except GlanceUnavailable:
        return


# ── through a mount ──


@pytest.fixture
def make_wired(
    make_mount: Callable[..., Mount], make_glance: Callable[..., ServedGlance], glance: ServedGlance
) -> Callable[..., Mount]:
    """Return `make_wired(line, **config)`: an impatient mount behind this wire."""

    def make(line: Wire, **config: object) -> Mount:
        patience = {"first_byte_timeout": 1, "between_bytes_timeout": 1, "connect_timeout": 1}
        return make_mount(line.url, **(patience | config))

    return make


def port_of(glance: ServedGlance) -> int:
    return int(glance.url.rpartition(":")[2])


def test_mount_over_verified_tls(
    make_wired: Callable[..., Mount], glance: ServedGlance, tmp_path: Path
) -> None:
    """[I1] An authority and a client certificate of the operator's own; one that expires delays, and no more."""
    authority = Authority(tmp_path / "authority")
    ours = authority.sign()
    context = partial(authority.server_context, asks_clients=True)
    files = {"ca_file": authority.ca_file, "cert_file": ours.cert_file, "key_file": ours.key_file}
    image = glance.add(8 * MIB)
    with wire(port_of(glance), context(authority.sign())) as line:
        mount = make_wired(line, **files)
        path = mount.path_of(image)
        assert read_direct(path, 0, MIB) == image.content[:MIB]
        # Connections that stand outlive a certificate; those are cut, so that new ones are made.
        line.tls = context(authority.sign(days_left=-1))
        line.vanish()
        line.come_back()
        read = mount.read_later(image, 5 * MIB, MIB)
        wait_until(lambda: "certificate has expired" in str(mount.status()["glance"]), "the reason", 30)
        assert not read.done()
        line.tls = context(authority.sign())
        assert read.result(30) == image.content[5 * MIB : 6 * MIB]
        assert path.read_bytes() == image.content


def test_server_that_vanishes_under_readers(make_wired: Callable[..., Mount], glance: ServedGlance) -> None:
    """[I1] Connections stay silent for ever, new ones too: twenty readers cost one request a pause, then all read."""
    image = glance.add(24 * MIB)
    with wire(port_of(glance)) as line:
        mount = make_wired(line)
        path = mount.path_of(image)
        assert read_direct(path, 0, MIB) == image.content[:MIB]
        glance.fail(FaultRule("stall", image_id=image.id, bytes=200_000, seconds=600, count=2))
        stalled = mount.read_later(image, 2 * MIB, MIB)
        wait_until(lambda: len(glance.data_requests(image)) >= 2, "a body that stalls")
        line.vanish()
        starts = range(3 * MIB, 23 * MIB, MIB)
        reads = [mount.read_later(image, start, MIB) for start in starts]
        wait_until(lambda: mount.status()["glance"]["is_down"], "the breaker", 30)
        made, looked_at = line.accepted, time.monotonic()
        time.sleep(3)
        # A probe takes 2 s of silence; each of the others would have made its own.
        assert line.accepted - made <= (time.monotonic() - looked_at) / 2 + 2
        assert not any(read.done() for read in reads)
        assert read_direct(path, 0, MIB) == image.content[:MIB], "what is here is read meanwhile"
        glance.fail()
        line.come_back()
        for start, read in zip(starts, reads, strict=True):
            assert read.result(30) == image.content[start : start + MIB]
        assert stalled.result(30) == image.content[2 * MIB : 3 * MIB]
