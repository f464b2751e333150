"""What travels through the control socket, and how it is written as JSON.

    GET  /v1/status                 the object of `lazyimg status --json`
    GET  /metrics                   the same in numbers, as Prometheus reads them
    GET  /v1/image?image=I          ImageFacts
    POST /v1/evict?image=I          {"freed_bytes": int}
    POST /v1/restart                {"daemon_pid": int} of the daemon that ends now
    POST /v1/give-up-mount          likewise
    POST /v1/prefetch?image=I       Progress, one object a line (application/x-ndjson)
    POST /v1/verify?image=I         Progress, likewise

An error is {"error": class name in lazyimg.errors, "message": what the user reads}, with a status that fits;
in a stream that has begun it is the last line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from lazyimg import errors
from lazyimg.errors import (
    ConfigError,
    CredentialsRefused,
    ImageForbidden,
    ImageNotFound,
    ImageRefused,
    InUse,
    LazyImgError,
    Unreachable,
)

log = logging.getLogger(__name__)

# The first class that fits decides.
HTTP_STATUS: tuple[tuple[type[LazyImgError], int], ...] = (
    (ConfigError, 400),
    (ImageForbidden, 403),
    (ImageNotFound, 404),
    (InUse, 409),
    (ImageRefused, 422),
    (CredentialsRefused, 502),
    (Unreachable, 503),
    (LazyImgError, 500),
)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the companion must know of one image.

    size_bytes: of the source.  presented_size_bytes: of the file under the mount.
    presented_format: what qemu must be told that file is, "raw" or "qcow2".
    properties: the image's own, such as kernel_id and ramdisk_id.  mountpoint: where base_name is found.
    """

    id: str
    name: str | None
    base_name: str
    disk_format: str | None
    container_format: str | None
    size_bytes: int
    presented_size_bytes: int
    presented_format: str
    view: str
    mountpoint: str
    min_disk_gib: int = 0
    os_hash_algo: str | None = None
    os_hash_value: str | None = None
    checksum: str | None = None
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a prefetch or a verify has come.

    damaged_chunks and source_hash are a verify's; source_hash is None until the last step.
    """

    done_bytes: int
    total_bytes: int
    damaged_chunks: int = 0
    source_hash: Literal["match", "mismatch", "unknown"] | None = None


Message = TypeVar("Message", ImageFacts, Progress)


def parse_message(kind: type[Message], answer: Mapping[str, Any]) -> Message:
    """Return the message that `dataclasses.asdict` made.  Raises TypeError if a field is missing.

    Unknown fields are those of a later version, and left out.
    """
    return kind(**{f.name: answer[f.name] for f in fields(kind) if f.name in answer})


def error_answer(exc: Exception) -> tuple[int, dict[str, str]]:
    """Return HTTP status and body of an error; one not ours nor a disk's shows only its class, and is logged."""
    if isinstance(exc, OSError):
        exc = LazyImgError(f"{exc}; `lazyimg status --json` says how the cache disk is")
    if not isinstance(exc, LazyImgError):
        log.error("control request failed", exc_info=exc)
        exc = LazyImgError(f"the daemon failed inside ({type(exc).__name__}); its log has the traceback")
    status = next(status for kind, status in HTTP_STATUS if isinstance(exc, kind))
    return status, {"error": type(exc).__name__, "message": str(exc)}


def raise_error(answer: Mapping[str, Any]) -> None:
    """Raise the error that `error_answer` described, if `answer` is one; only classes of lazyimg.errors."""
    if "error" not in answer:
        return
    kind = getattr(errors, str(answer["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, LazyImgError)):
        kind = LazyImgError
    message = str(answer.get("message"))
    try:
        error = kind(message)
    except TypeError:
        # A class whose constructor wants more than a message; what the user reads is the same.
        error = LazyImgError(message)
    raise error
