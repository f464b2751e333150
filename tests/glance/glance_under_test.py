"""A Glance as the contract sees it, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lazyimg.glance.auth import Auth
from lazyimg.glance.client import GlanceClient


@dataclass
class Server:
    """A Glance under contract.

    client: ours.  http: bare HTTP with the same rights.  data_path: where an image's bytes are, by its id.
    are_all_admin: nobody is refused anything.
    """

    client: GlanceClient
    http: httpx.AsyncClient
    data_path: Callable[[str], Path]
    has_ranges: bool
    are_all_admin: bool

    async def create(self, **fields: Any) -> str:
        """Make a queued image over the API and return its id."""
        fields = {"disk_format": "raw", "container_format": "bare"} | fields
        reply = await self.http.post("/v2/images", json=fields)
        assert reply.status_code == 201, reply.text
        image_id: str = reply.json()["id"]
        return image_id

    async def upload(self, data: bytes, **fields: Any) -> str:
        """Make an active image over the API and return its id."""
        image_id = await self.create(**fields)
        headers = {"Content-Type": "application/octet-stream"}
        reply = await self.http.put(f"/v2/images/{image_id}/file", content=data, headers=headers)
        assert reply.status_code == 204, reply.text
        return image_id


def make_client(auth: Auth) -> GlanceClient:
    """Return a client as the daemon makes it, with a shorter patience for silence."""
    return GlanceClient(
        auth, connect_timeout_s=5, first_byte_timeout_s=20, between_bytes_timeout_s=2, connections_max=4
    )
