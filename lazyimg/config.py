"""Configuration: a TOML file, `LAZYIMG_*` variables and flags, in rising order of precedence.

Every limit the program has is named here.  Unknown keys and impossible values are refused at start with the
key's name and what would do.  Sizes are bytes or words such as "20 GiB"; times are seconds.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from lazyimg.errors import ConfigError

CONFIG_PATH = Path("/etc/lazyimg/lazyimg.toml")
CONTROL_PATH = Path("/run/lazyimg/control.sock")
CACHE_DIR = Path("/var/lib/lazyimg")
ENV_PREFIX = "LAZYIMG_"
# Variables with our prefix that are not configuration keys.
ENV_NOT_KEYS = frozenset({"LAZYIMG_CONFIG"})

Seconds = Annotated[float, Field(gt=0, le=86400)]
Threads = Annotated[int, Field(ge=1, le=256)]


def _as_list(value: object) -> object:
    return value.split() if isinstance(value, str) else value


class Config(BaseModel):
    """Everything an operator can set; the field comments are the reference."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # ── where Glance is ──
    # Bare endpoints without authentication, tried in turn.
    endpoint: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    # Name in clouds.yaml; "envvars" for OS_*.  Neither endpoint nor cloud: OS_CLOUD or OS_* must be set.
    cloud: str | None = None
    # With an https endpoint: the only authorities it may be signed by (none: the system's), and what it is shown of us.
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    # For a connection; from there to the first byte of an answer; and for each silence within one.
    connect_timeout: Seconds = 5
    first_byte_timeout: Seconds = 20
    between_bytes_timeout: Seconds = 10
    # How long "no such image" is believed.
    negative_ttl: Annotated[float, Field(ge=0, le=3600)] = 2

    # ── where things are kept ──
    cache_dir: Path = CACHE_DIR
    # Least recently used images that are not open are dropped above this; 0: no limit.
    cache_size_max: ByteSize = ByteSize(0)
    # Free space kept on the cache's file system.
    cache_free_min: ByteSize = ByteSize(1 << 30)
    control: Path = CONTROL_PATH
    # Group of the control socket (name or number), and its mode in octal.
    control_group: str | None = None
    control_mode: str = "0600"
    # Host and port where anybody may read the metrics, and nothing else; none: only the control socket has them.
    metrics_listen: str | None = None

    # ── how images are shown ──
    view: Literal["raw", "stored"] = "raw"
    allow_other: bool = True
    # What images show for owner (user or user:group, none: the upper folder's) and for permissions, in octal.
    image_owner: Annotated[str | None, Field(pattern=r"^[^:\s]+(:[^:\s]+)?$")] = None
    image_mode: str = "0644"
    # The mount's read-ahead; large buffered reads otherwise come in pieces of 128 KiB.
    read_ahead: ByteSize = ByteSize(1 << 20)

    # ── how long a guest may wait ──
    read_timeout: Seconds = 300
    lookup_timeout: Seconds = 2
    # A cache disk that does not answer within this is bypassed: its images are read from Glance until it is back.
    disk_timeout: Seconds = 10
    # Longest pause between two attempts while a reader waits.
    retry_pause_max: Seconds = 5
    # `lazyimg restart`: until the other daemon is prepared, and for draining where the kernel cannot send again.
    restart_timeout: Seconds = 30

    # ── how much is asked of Glance at once ──
    requests_max: Annotated[int, Field(ge=1, le=256)] = 16
    background_requests_max: Annotated[int, Field(ge=1, le=256)] = 4
    request_bytes_max: ByteSize = ByteSize(8 << 20)
    random_request_bytes_max: ByteSize = ByteSize(512 << 10)

    # A request that a guest waits for and that is slower than nearly all lately were may be sent a second time.
    hedge: bool = True

    # ── how much this process takes ──
    # FUSE requests handled at once; above it the kernel queues them.
    tasks_max: Annotated[int, Field(ge=100, le=100_000)] = 5000
    cache_read_threads: Threads = 8
    cache_write_threads: Threads = 4
    upper_threads: Threads = 8
    # For compressed clusters above 256 KiB.
    decode_threads: Threads = 2
    # Tables that say where a decoded image's bytes lie, kept in memory for each open image; others are on disk.
    tables_memory_max: Annotated[ByteSize, Field(ge=1 << 20)] = ByteSize(16 << 20)
    # Chunk files open at once; above it those not used lately are closed until they are read again.
    open_files_max: Annotated[int, Field(ge=16, le=1_000_000)] = 512
    # Bytes received and not yet written to the cache.
    write_buffer_max: ByteSize = ByteSize(64 << 20)

    # ── how images become whole ──
    # The rest of an image that is open is fetched in the background, this long after the last want of a guest's, and
    # at most so many bytes a second for all images together; 0: no limit.
    hydrate: bool = True
    hydrate_delay: Annotated[float, Field(ge=0, le=86400)] = 30
    hydrate_rate: ByteSize = ByteSize(0)
    # An image that is whole is compared with Glance's hash of it, at most so many bytes a second; 0: no limit.
    hash_rate: ByteSize = ByteSize(100 << 20)

    # ── not built yet: only false is possible ──
    graduate: bool = False

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @field_validator("endpoint")
    @classmethod
    def _endpoints_are_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"{url!r} is not an http:// or https:// URL")
        return value

    @field_validator("control_mode", "image_mode")
    @classmethod
    def _mode_is_octal(cls, value: str) -> str:
        try:
            mode = int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            raise ValueError('give an octal mode such as "0660"')
        return value

    @field_validator("metrics_listen")
    @classmethod
    def _is_host_and_port(cls, value: str | None) -> str | None:
        if value is not None:
            host_and_port(value)
        return value

    @field_validator("graduate")
    @classmethod
    def _is_built(cls, value: bool) -> bool:
        if value:
            raise ValueError("not built yet, set it to false")
        return value

    @model_validator(mode="after")
    def _limits_agree(self) -> Config:
        if self.endpoint and self.cloud:
            raise ValueError("endpoint and cloud exclude each other: give one of them")
        if self.background_requests_max > self.requests_max:
            raise ValueError("background_requests_max must not be above requests_max")
        if self.random_request_bytes_max > self.request_bytes_max:
            raise ValueError("random_request_bytes_max must not be above request_bytes_max")
        return self


def host_and_port(text: str) -> tuple[str, int]:
    """Return the parts of "127.0.0.1:9177" or "[::1]:9177".  Raises ValueError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError('give host and port, such as "127.0.0.1:9177"')
    return host, int(port)


def load_config(
    path: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Config:
    """Return the configuration from file, environment and flags, the later winning.

    `path` None means /etc/lazyimg/lazyimg.toml if it exists; a `path` that was given must exist.
    Flags that are None were not given.  Raises ConfigError naming the first bad key and what would do.
    """
    environ = os.environ if environ is None else environ
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for where, layer in (
        (str(path or CONFIG_PATH), _from_file(path)),
        ("environment", _from_environ(environ)),
        ("command line", {k: v for k, v in (flags or {}).items() if v is not None}),
    ):
        # A more specific layer that says where Glance is replaces the whole answer of the layers below.
        for one, other in (("endpoint", "cloud"), ("cloud", "endpoint")):
            if one in layer and other not in layer:
                values.pop(other, None)
        values.update(layer)
        origin.update(dict.fromkeys(layer, where))
    try:
        return Config(**values)
    except ValidationError as exc:
        raise ConfigError(_first_problem(exc, origin)) from exc


def _from_file(path: Path | None) -> dict[str, Any]:
    if path is None and not CONFIG_PATH.exists():
        return {}
    path = path or CONFIG_PATH
    try:
        return tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"config {path}: {exc.strerror}; give a readable file with --config") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"config {path}: not TOML: {exc}") from exc


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        name.removeprefix(ENV_PREFIX).lower(): value
        for name, value in environ.items()
        if name.startswith(ENV_PREFIX) and name not in ENV_NOT_KEYS
    }


def _first_problem(exc: ValidationError, origin: Mapping[str, str]) -> str:
    problem = exc.errors(include_url=False)[0]
    if not problem["loc"]:
        return f"config: {problem['msg'].removeprefix('Value error, ')}"
    key = str(problem["loc"][0])
    where = origin.get(key, "default")
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(Config.model_fields))
        return f"config key {key!r} ({where}): unknown; known keys are {known}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"config key {key!r} ({where}): {message}, not {problem['input']!r}"


_BYTE_SIZE: TypeAdapter[ByteSize] = TypeAdapter(ByteSize)


def parse_size(text: str) -> int:
    """Return the bytes of "20G", "512M", "10 GiB" or "4096"; a bare letter is a power of 1024, as in qemu-img.

    Raises ConfigError.
    """
    stripped = text.strip()
    if stripped[-1:].upper() in ("K", "M", "G", "T", "P") and stripped[:-1].strip():
        stripped += "iB"
    try:
        size = int(_BYTE_SIZE.validate_python(stripped))
    except ValidationError:
        size = -1
    if size <= 0:
        raise ConfigError(f"size {text!r}: give bytes or a number with K, M, G or T, such as 20G")
    return size
