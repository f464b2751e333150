"""An embedded Glance with one image, and an impatient client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path

import pytest
import trio

from lazyimg.core.identity import ImageRecord
from lazyimg.demo.glance import EmbeddedGlance, serve
from lazyimg.glance.auth import NoAuth
from lazyimg.glance.client import GlanceClient

DATA = b"".join(number.to_bytes(8, "big") for number in range(100_000))
SIZE_BYTES = len(DATA)


def make_client(*urls: str, connections_max: int = 4, first_byte_timeout_s: float = 2) -> GlanceClient:
    """Return an impatient client; less patience would take a busy machine for a silent server."""
    return GlanceClient(
        NoAuth(urls),
        connect_timeout_s=1,
        first_byte_timeout_s=first_byte_timeout_s,
        between_bytes_timeout_s=1,
        connections_max=connections_max,
    )


class Here:
    """An embedded Glance with one image, and a client of it."""

    def __init__(self, glance: EmbeddedGlance, url: str, record: ImageRecord, client: GlanceClient) -> None:
        self.glance, self.url, self.record, self.client = glance, url, record, client

    async def read(self, start: int, stop: int, client: GlanceClient | None = None) -> bytes:
        """Read a range whole."""
        into = bytearray()
        await self.read_into(into, start, stop, client)
        return bytes(into)

    async def read_into(
        self, into: bytearray, start: int, stop: int, client: GlanceClient | None = None
    ) -> None:
        """Read a range; what came stays in `into` when it fails."""
        body = (client or self.client).open_range(self.record.id, start, stop, size_bytes=SIZE_BYTES)
        async with body as pieces:
            async for piece in pieces:
                into += piece


@pytest.fixture
async def here(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Here]:
    """A Glance, its image and a client."""
    glance = EmbeddedGlance(tmp_path)
    record = glance.add_image(DATA)
    url = await nursery.start(partial(serve, glance))
    async with aclosing(make_client(url)) as client:
        yield Here(glance, url, record, client)
