"""The contract with Glance: one body, held against the embedded one and the real one alike."""

from __future__ import annotations

import hashlib
import itertools
import uuid

import pytest
from glance_under_test import Server

import lazyimg.glance.client
from lazyimg.errors import GlanceUnavailable, ImageForbidden, ImageNotFound, RangesNotSupported, SourceDoubted

# Each eight bytes hold their own number: a byte that is shifted or missing shows.
DATA = b"".join(number.to_bytes(8, "big") for number in range(40_000)) + b"odd"
SIZE = len(DATA)

pytestmark = [
    pytest.mark.slow,
    # openstacksdk says so whenever it is used; nothing of ours has to do with InfluxDB.
    pytest.mark.filterwarnings("ignore:Support for InfluxDB requires"),
]


async def read_range(server: Server, image_id: str, start: int, stop: int, size_bytes: int = SIZE) -> bytes:
    """Return all that the client gives of a range."""
    async with server.client.open_range(image_id, start, stop, size_bytes=size_bytes) as pieces:
        return b"".join([piece async for piece in pieces])


async def read_stream(
    server: Server, image_id: str, size_bytes: int = SIZE, into: bytearray | None = None
) -> bytes:
    """Return all that the client gives of the whole image; what came stays in `into` when it fails."""
    into = bytearray() if into is None else into
    async with server.client.open_stream(image_id, size_bytes=size_bytes) as pieces:
        async for piece in pieces:
            into += piece
    return bytes(into)


async def test_record_says_what_was_uploaded(server: Server) -> None:
    """Size, formats, hashes, status and the image's own properties come back as they are."""
    kernel_id = str(uuid.uuid4())
    image_id = await server.upload(DATA, name="one", min_disk=3, kernel_id=kernel_id, os_distro="debian")
    record = await server.client.image(image_id)
    assert (record.id, record.name, record.status, record.size_bytes) == (image_id, "one", "active", SIZE)
    assert (record.disk_format, record.container_format, record.min_disk_gib) == ("raw", "bare", 3)
    assert (record.os_hash_algo, record.os_hash_value) == ("sha512", hashlib.sha512(DATA).hexdigest())
    assert record.checksum == hashlib.md5(DATA).hexdigest()
    assert record.virtual_size_bytes == SIZE
    assert record.properties["kernel_id"] == kernel_id
    assert record.properties["os_distro"] == "debian"
    assert not {"status", "file", "schema", "self", "visibility"} & record.properties.keys()


async def test_each_range_says_whose_content_it_is(server: Server) -> None:
    """[I1] Glance sends the whole image's checksum with any part of it, by which another image's bytes are known."""
    image_id = await server.upload(DATA, name="pinned")
    checksum = (await server.client.image(image_id)).checksum
    assert checksum is not None
    client = server.client
    async with client.open_stream(image_id, size_bytes=SIZE, checksum=checksum) as pieces:
        assert b"".join([piece async for piece in pieces]) == DATA
    with pytest.raises(SourceDoubted, match=f"whose checksum is {checksum}, not {'0' * 32}"):
        async with client.open_stream(image_id, size_bytes=SIZE, checksum="0" * 32):
            pass
    if server.has_ranges:
        async with client.open_range(image_id, 8, 800, size_bytes=SIZE, checksum=checksum) as pieces:
            assert b"".join([piece async for piece in pieces]) == DATA[8:800]
        with pytest.raises(SourceDoubted):
            async with client.open_range(image_id, 8, 800, size_bytes=SIZE, checksum="0" * 32):
                pass


async def test_schema_tells_fields_from_properties(server: Server) -> None:
    """Nova's client asks for it before its first record; a property such as kernel_id is no field of every image."""
    schema = (await server.http.get("/v2/schemas/image")).json()
    assert schema["name"] == "image"
    fields = {name for name, about in schema["properties"].items() if about.get("is_base", True)}
    assert {"id", "name", "size", "status", "disk_format", "min_disk", "os_hash_value", "tags"} <= fields
    assert not {"kernel_id", "os_distro"} & fields


async def test_list_has_every_image_newest_first(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All pages, community and hidden images too, each once, in the order of their making."""
    monkeypatch.setattr(lazyimg.glance.client, "LIST_PAGE_IMAGES", 2)
    made = [await server.create(name=f"number {number}") for number in range(5)]
    made.append(await server.upload(b"common", visibility="community"))
    hidden = await server.create(os_hidden=True)
    records = await server.client.list_images()
    ids = [record.id for record in records]
    assert {*made, hidden} <= set(ids)
    assert len(set(ids)) == len(ids)
    assert [record.created_at for record in records] == sorted(
        (record.created_at for record in records), reverse=True
    )
    assert next(record for record in records if record.id == made[-1]).size_bytes == 6


async def test_range_is_exact_or_refused_as_unsupported(server: Server) -> None:
    """A range is its bytes, whatever its offsets; a store without ranges is told apart."""
    image_id = await server.upload(DATA)
    edges = (0, 1, 4097, 65536, 300_001, SIZE - 1, SIZE)
    for start, stop in itertools.combinations(edges, 2):
        if server.has_ranges:
            assert await read_range(server, image_id, start, stop) == DATA[start:stop]
        else:
            with pytest.raises(RangesNotSupported, match=image_id):
                await read_range(server, image_id, start, stop)


async def test_stream_is_the_whole_image(server: Server) -> None:
    """Without a range all bytes come, from any store."""
    image_id = await server.upload(DATA)
    assert await read_stream(server, image_id) == DATA


async def test_range_past_the_end_is_never_bytes(server: Server) -> None:
    """A client that believes the image longer gets no byte for what is not there."""
    image_id = await server.upload(DATA)
    with pytest.raises((GlanceUnavailable, RangesNotSupported)):
        await read_range(server, image_id, SIZE, SIZE + 10, SIZE + 100)
    with pytest.raises((GlanceUnavailable, RangesNotSupported)):
        await read_range(server, image_id, SIZE - 10, SIZE + 10, SIZE + 100)


async def test_stream_of_another_size_is_refused(server: Server) -> None:
    """An image that is not as long as its record was is not taken for it."""
    image_id = await server.upload(DATA)
    with pytest.raises(GlanceUnavailable):
        await read_stream(server, image_id, SIZE + 1)


async def test_unknown_and_deleted_images_are_not_found(server: Server) -> None:
    """Neither record nor bytes."""
    image_id = await server.upload(DATA)
    assert (await server.http.delete(f"/v2/images/{image_id}")).status_code == 204
    for missing in (image_id, str(uuid.uuid4())):
        with pytest.raises(ImageNotFound, match=missing):
            await server.client.image(missing)
        with pytest.raises(ImageNotFound, match=missing):
            await read_range(server, missing, 0, 10)


async def test_deactivated_image_shows_its_record_and_no_bytes(server: Server) -> None:
    """The record stays and says so; only an administrator still gets bytes, right ones."""
    image_id = await server.upload(DATA)
    path = f"/v2/images/{image_id}/actions"
    assert (await server.http.post(f"{path}/deactivate")).status_code == 204
    assert (await server.client.image(image_id)).status == "deactivated"
    if server.are_all_admin:
        assert await read_range(server, image_id, 5, 500) == DATA[5:500]
    else:
        with pytest.raises(ImageForbidden, match="deactivated"):
            await read_range(server, image_id, 5, 500)
    assert (await server.http.post(f"{path}/reactivate")).status_code == 204
    assert await read_stream(server, image_id) == DATA


async def test_queued_image_has_a_record_and_no_bytes(server: Server) -> None:
    """Its size is unknown; asking for bytes is a passing fault."""
    image_id = await server.create()
    record = await server.client.image(image_id)
    assert (record.status, record.size_bytes, record.os_hash_value) == ("queued", None, None)
    with pytest.raises(GlanceUnavailable):
        await read_range(server, image_id, 0, 10)
    with pytest.raises(GlanceUnavailable):
        await read_stream(server, image_id)


async def test_lost_data_is_a_passing_fault(server: Server) -> None:
    """Glance answers 204 when its store lost the file: that is not an empty image."""
    image_id = await server.upload(DATA)
    server.data_path(image_id).unlink()
    with pytest.raises((GlanceUnavailable, RangesNotSupported)):
        await read_range(server, image_id, 0, 10)
    with pytest.raises(GlanceUnavailable):
        await read_stream(server, image_id)


async def test_truncated_data_ends_in_an_error_after_what_came(server: Server) -> None:
    """Glance announces the full length, sends what is left and goes silent."""
    image_id = await server.upload(DATA)
    with server.data_path(image_id).open("r+b") as file:
        file.truncate(100_000)
    came = bytearray()
    with pytest.raises(GlanceUnavailable):
        await read_stream(server, image_id, into=came)
    assert DATA.startswith(bytes(came))
    assert len(came) <= 100_000


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [("HEAD", {}, 405), ("GET", {"Range": "bytes=0-1,4-5"}, 400)],
)
async def test_servers_agree_on_what_they_refuse(
    server: Server, method: str, headers: dict[str, str], status: int
) -> None:
    """The embedded one refuses what the real one refuses, with the same status."""
    image_id = await server.upload(DATA)
    reply = await server.http.request(method, f"/v2/images/{image_id}/file", headers=headers)
    assert reply.status_code == status


async def test_servers_agree_on_a_range_past_the_end(server: Server) -> None:
    """416 from a store with ranges."""
    image_id = await server.upload(DATA)
    headers = {"Range": f"bytes={SIZE}-{SIZE + 5}"}
    reply = await server.http.get(f"/v2/images/{image_id}/file", headers=headers)
    assert reply.status_code == 416


async def test_servers_agree_on_the_checksum_of_a_range(server: Server) -> None:
    """Content-MD5 is the whole image's, whatever part is sent: it proves nothing about a range."""
    image_id = await server.upload(DATA)
    if not server.has_ranges:
        reply = await server.http.get(f"/v2/images/{image_id}/file")
    else:
        reply = await server.http.get(f"/v2/images/{image_id}/file", headers={"Range": "bytes=0-9"})
        assert reply.headers["Content-Range"] == f"bytes 0-9/{SIZE}"
    assert reply.headers["Content-MD5"] == hashlib.md5(DATA).hexdigest()
