"""The embedded Glance: enough of the Image API v2 for the demo, tests and benchmarks.

It is trusted because it passes the same contract as the real one (tests/glance), with its ranges, its 204s
and its silences.  It knows nothing of the client.  A FaultPlan makes it fail on purpose.
"""

from __future__ import annotations

import argparse
import logging
import re
import signal
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import hypercorn.config
import hypercorn.trio
import trio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send

from lazyimg.core.identity import ImageRecord, is_image_id
from lazyimg.demo.faults import FaultPlan, FaultRule
from lazyimg.demo.glance_images import BASE_FIELDS, BLOCK_SIZE_BYTES, DataWriter, Fields, GlanceImages
from lazyimg.demo.glance_reply import DataReply, befall, drop_connections
from lazyimg.glance.records import parse_record

# Glance's own: limit_param_default and api_limit_max.
LIST_LIMIT_DEFAULT = 25
LIST_LIMIT_MAX = 1000
REQUESTS_LOGGED_MAX = 100_000

_RANGE = re.compile(r"bytes=(\d+)-(\d*)", re.ASCII)
_NO_RANGES = "Getting images randomly from this store is not supported. Offset: {}, length: {}"


@dataclass(slots=True)
class LoggedRequest:
    """One request as it came, and the status of the answer; None while there is none."""

    method: str
    path: str
    range: str | None
    status: int | None = None


@dataclass
class EmbeddedGlance:
    """One Glance with its images in `folder`; an ASGI application.

    no_ranges: answer as a store that cannot do them (rbd, s3, swift), as for a single image with the property
    no_ranges=true.  latency_s: wait before each answer.
    token: when set, requests without it get 401; change it to revoke.  requests: what came, newest last.
    """

    folder: Path
    no_ranges: bool = False
    latency_s: float = 0.0
    token: str | None = None
    faults: FaultPlan = field(default_factory=FaultPlan)
    requests: deque[LoggedRequest] = field(default_factory=lambda: deque(maxlen=REQUESTS_LOGGED_MAX))

    def __post_init__(self) -> None:
        self.images = GlanceImages(self.folder)
        image = "/v2/images/{image_id}"
        routes = [
            Route("/v2/images", self._list, methods=["GET"]),
            Route("/v2/images", self._create, methods=["POST"]),
            Route(f"{image}/file", self._data, methods=["GET"]),
            Route(f"{image}/file", self._upload, methods=["PUT"]),
            Route(f"{image}/actions/{{action}}", self._act, methods=["POST"]),
            Route(image, self._show, methods=["GET"]),
            Route(image, self._patch, methods=["PATCH"]),
            Route(image, self._delete, methods=["DELETE"]),
            Route("/v2/schemas/image", self._schema, methods=["GET"]),
            Route("/faults", self._set_faults, methods=["PUT"]),
            Route("/requests", self._show_requests, methods=["GET"]),
        ]
        for route in routes:
            # Starlette adds it to every GET; Glance answers 405.
            assert route.methods is not None
            route.methods.discard("HEAD")
        self._router = Router(routes, redirect_slashes=False)

    def add_image(
        self,
        data: Path | bytes,
        *,
        id: str | None = None,
        name: str | None = None,
        disk_format: str = "raw",
        with_hash: bool = True,
        **properties: Any,
    ) -> ImageRecord:
        """Add an active image without HTTP; a file is referred to, not copied.

        properties: further fields such as visibility, or the image's own, such as kernel_id.  Hashing takes
        about 3 s per GiB; without it the record has none, as that of an http-located image.
        """
        settings = {"id": id, "name": name, "disk_format": disk_format, "container_format": "bare"}
        image_id = self.images.create(settings | properties)["id"]
        if isinstance(data, Path):
            return parse_record(self.images.link(image_id, data, with_hash=with_hash))
        writer = DataWriter(self.images.data_path(image_id))
        for start in range(0, len(data), BLOCK_SIZE_BYTES):
            writer.write(data[start : start + BLOCK_SIZE_BYTES])
        size_bytes, md5, sha512 = writer.finish()
        if not with_hash:
            return parse_record(self.images.activate(image_id, size_bytes, None, None))
        return parse_record(self.images.activate(image_id, size_bytes, md5, sha512))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, unless the plan says otherwise."""
        if scope["type"] != "http":
            return await self._accept_lifespan(receive, send)
        request = Request(scope, receive)
        if scope["path"] in ("/faults", "/requests"):
            return await self._router(scope, receive, send)
        entry = LoggedRequest(request.method, scope["path"], request.headers.get("range"))
        self.requests.append(entry)
        scope["fault"] = fault = self.faults.fault_nowait(*_kind_and_image(scope["path"]))

        async def noting_status(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            await send(message)

        await trio.sleep(self.latency_s)
        if fault is not None and await befall(fault, scope, receive, noting_status):
            return None
        if self.token is not None and request.headers.get("x-auth-token") != self.token:
            return await Response("<h1>401 Unauthorized</h1>", 401)(scope, receive, noting_status)
        return await self._router(scope, receive, noting_status)

    @staticmethod
    async def _accept_lifespan(receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _list(self, request: Request) -> Response:
        query = request.query_params
        limit = min(int(query.get("limit", LIST_LIMIT_DEFAULT)), LIST_LIMIT_MAX)
        hidden = query.get("os_hidden", "false").lower() == "true"
        wanted = query.get("visibility")
        fits = [
            fields
            for fields in self.images.newest_first()
            if fields["os_hidden"] == hidden
            # Without a filter, community images of others are not listed.
            and (
                fields["visibility"] != "community"
                if wanted is None
                else wanted in ("all", fields["visibility"])
            )
        ]
        if (marker := query.get("marker")) is not None:
            position = [fields["id"] for fields in fits].index(marker) if marker in self.images else None
            if position is None:
                return _error(404, f"Marker {marker} could not be found")
            fits = fits[position + 1 :]
        page: Fields = {"images": fits[:limit], "first": "/v2/images", "schema": "/v2/schemas/images"}
        if len(fits) > limit > 0:
            following = request.url.include_query_params(marker=fits[limit - 1]["id"])
            page["next"] = f"/v2/images?{following.query}"
        return JSONResponse(page)

    async def _create(self, request: Request) -> Response:
        settings = await request.json()
        image_id = settings.get("id")
        if image_id is not None and not is_image_id(image_id):
            return _error(400, "Invalid image id format")
        if image_id in self.images:
            return _error(409, f"Image ID {image_id} already exists!")
        fields = self.images.create(settings)
        return JSONResponse(fields, 201, {"Location": str(request.url_for("_show", image_id=fields["id"]))})

    async def _show(self, request: Request) -> Response:
        fields = self.images.get(request.path_params["image_id"])
        return JSONResponse(fields) if fields else _no_image(request)

    async def _schema(self, _: Request) -> Response:
        """What python-glanceclient, and Nova through it, tells an image's properties from its fields by."""
        fields: dict[str, dict[str, str]] = {name: {} for name in BASE_FIELDS}
        more = {"type": "string"}
        return JSONResponse({"name": "image", "properties": fields, "additionalProperties": more})

    async def _patch(self, request: Request) -> Response:
        """JSON patch (RFC 6902) of single fields."""
        image_id = request.path_params["image_id"]
        if image_id not in self.images:
            return _no_image(request)
        changes = {
            operation["path"].removeprefix("/"): operation.get("value") for operation in await request.json()
        }
        return JSONResponse(self.images.change(image_id, changes))

    async def _delete(self, request: Request) -> Response:
        image_id = request.path_params["image_id"]
        if image_id not in self.images:
            return _no_image(request)
        self.images.delete(image_id)
        return Response(status_code=204)

    async def _act(self, request: Request) -> Response:
        image_id, action = request.path_params["image_id"], request.path_params["action"]
        status = {"deactivate": "deactivated", "reactivate": "active"}.get(action)
        if image_id not in self.images or status is None:
            return _no_image(request)
        self.images.change(image_id, {"status": status})
        return Response(status_code=204)

    async def _upload(self, request: Request) -> Response:
        image_id = request.path_params["image_id"]
        fields = self.images.get(image_id)
        if fields is None:
            return _no_image(request)
        if request.headers.get("content-type") != "application/octet-stream":
            return _error(415, "Unsupported Media Type")
        if fields["status"] != "queued":
            return _error(409, f"Image status transition from {fields['status']} to saving is not allowed")
        writer = DataWriter(self.images.data_path(image_id))
        self.images.change(image_id, {"status": "saving"})
        try:
            # One block is hashed and written while the next arrives.
            to_writer, blocks = trio.open_memory_channel[bytearray](1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_write_all, writer, blocks)
                async with to_writer:
                    block = bytearray()
                    async for piece in request.stream():
                        block += piece
                        if len(block) >= BLOCK_SIZE_BYTES:
                            await to_writer.send(block[:BLOCK_SIZE_BYTES])
                            del block[:BLOCK_SIZE_BYTES]
                    await to_writer.send(block)
            size_bytes, md5, sha512 = await trio.to_thread.run_sync(writer.finish)
        except BaseException:
            # Most often the client went away.
            writer.abandon()
            self.images.change(image_id, {"status": "queued"})
            raise
        self.images.activate(image_id, size_bytes, md5, sha512)
        return Response(status_code=204)

    async def _data(self, request: Request) -> Response:
        image_id = request.path_params["image_id"]
        fields = self.images.get(image_id)
        if fields is None:
            return _no_image(request)
        if fields["status"] == "deactivated":
            return _error(403, "The requested image has been deactivated. Image data download is forbidden.")
        path = self.images.data_path(image_id)
        asked = request.headers.get("range")
        if asked is not None and "," in asked:
            return _error(400, "Requests with multiple ranges are not supported in Glance.")
        match = _RANGE.fullmatch(asked or "")
        if fields["size"] is None and match:
            return Response("Internal Server Error", 500)
        if not path.exists():
            return Response(status_code=204)
        size_bytes: int = fields["size"]
        fault: FaultRule | None = request.scope["fault"]
        headers = {"Content-Type": "application/octet-stream"}
        if fields["checksum"]:
            # The whole image's, whatever part is sent: so does the real one.
            headers["Content-MD5"] = fields["checksum"]
        if match is None or (fault is not None and fault.action == "whole_body"):
            status = 200
            if match is not None and fault is not None and fault.status == 206:
                status = 206
                headers["Content-Range"] = f"bytes {match[1]}-{match[2]}/{size_bytes}"
            return DataReply(path, 0, size_bytes, status, headers, fault)
        start, stop = int(match[1]), min(int(match[2] or size_bytes) + 1, size_bytes)
        if start >= stop:
            return _error(
                416, f"The byte range passed in the 'Range' header did not match the range {start}-"
            )
        if self.no_ranges or fields.get("no_ranges") == "true":
            return _error(400, _NO_RANGES.format(start, stop - start))
        off_by = 1 if fault is not None and fault.action == "wrong_content_range" else 0
        headers["Content-Range"] = f"bytes {start + off_by}-{stop - 1 + off_by}/{size_bytes}"
        return DataReply(path, start, stop, 206, headers, fault)

    async def _set_faults(self, request: Request) -> Response:
        self.faults = FaultPlan.from_json(await request.json())
        return Response(status_code=204)

    async def _show_requests(self, _: Request) -> Response:
        return JSONResponse(
            [
                {"method": entry.method, "path": entry.path, "range": entry.range, "status": entry.status}
                for entry in self.requests
            ]
        )


async def serve(
    glance: EmbeddedGlance,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled; `nursery.start` returns the URL.  At the end connections are dropped."""
    config = hypercorn.config.Config()
    config.bind = [f"{host}:{port}"]
    config.accesslog = None
    config.errorlog = logging.getLogger("lazyimg.demo.hypercorn")
    config.include_server_header = False
    config.keep_alive_timeout = 75
    # A connection closed after so many requests would make a benchmark measure connecting.
    config.keep_alive_max_requests = 10**9
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(hypercorn.trio.serve, glance, config))  # type: ignore[arg-type]
        task_status.started(url)
        own_port = int(url.rpartition(":")[2])
        try:
            await trio.sleep_forever()
        finally:
            # hypercorn shields its writes from cancellation: a client that does not read would keep it.
            drop_connections(lambda own, _: own[1] == own_port)


def main() -> None:
    """Serve from a folder until SIGTERM or SIGINT; the URL is the first line on standard output."""
    parser = argparse.ArgumentParser(prog="python -m lazyimg.demo.glance", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of records and data")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--no-ranges", action="store_true", help="answer as a store that cannot do ranges")
    parser.add_argument("--latency-s", type=float, default=0.0, help="wait before each answer")
    options = parser.parse_args()
    glance = EmbeddedGlance(options.data, no_ranges=options.no_ranges, latency_s=options.latency_s)
    trio.run(_serve_until_signal, glance, options.host, options.port)


async def _serve_until_signal(glance: EmbeddedGlance, host: str, port: int) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            url = await nursery.start(partial(serve, glance, host=host, port=port))
            print(url, flush=True)
            await anext(signals)
            nursery.cancel_scope.cancel()


async def _write_all(writer: DataWriter, blocks: trio.MemoryReceiveChannel[bytearray]) -> None:
    async for block in blocks:
        await trio.to_thread.run_sync(writer.write, block)


def _kind_and_image(path: str) -> tuple[str, str | None]:
    match path.strip("/").split("/"):
        case ["v2", "images"]:
            return "list", None
        case ["v2", "images", image_id]:
            return "record", image_id
        case ["v2", "images", image_id, "file"]:
            return "data", image_id
    return "other", None


def _error(status: int, text: str) -> Response:
    return Response(f"<html><head><title>{status}</title></head><body>{text}</body></html>", status)


def _no_image(request: Request) -> Response:
    return _error(404, f"No image found with ID {request.path_params['image_id']}")


if __name__ == "__main__":
    main()
