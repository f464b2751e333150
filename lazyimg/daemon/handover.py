"""What a daemon starts from: descriptors, by name, and this, in a memory file beside them.

fuse       /dev/fuse of the mount               upper      the folder beneath it, opened before mounting
handles    see handles.py                       handover   the JSON object below
orders     the holder's orders, and its end: a SOCK_SEQPACKET that nobody else holds
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lazyimg.config import Config, load_config
from lazyimg.errors import ConfigError

logger = logging.getLogger(__name__)

# What a daemon asks of its holder and tells it, beyond systemd's protocol; messages of one line.
RESTART = "X_LAZYIMG_RESTART"
PREPARED = "X_LAZYIMG_PREPARED"
GOES_ON = "X_LAZYIMG_GOES_ON"
YIELDED = "X_LAZYIMG_YIELDED"
FAILED = "X_LAZYIMG_FAILED"
# What a holder orders, and what one says that a daemon started; any other order is why there is no restart.
DRAIN = "drain"
TAKEN_UP = "taken up"

# What every daemon needs, and every holder keeps.
KEPT = ("fuse", "upper", "handles")


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """Where the configuration comes from besides the environment."""

    path: str | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Config:
        """Return the configuration as it is now.  Raises ConfigError."""
        return load_config(None if self.path is None else Path(self.path), self.flags)


@dataclass(frozen=True, slots=True)
class Handover:
    """What a daemon starts from.

    config: as the last daemon that became ready had it.  is_planned: read it anew, and wait for the last daemon
    to end.  is_last_dying: that has the cache's lock and the control socket still, and serves nobody.  manager:
    $NOTIFY_SOCKET of whoever started the holder, or "".
    """

    config: Config
    source: ConfigSource
    mountpoint: Path
    init_request: bytes
    init_answer: bytes
    holder_pid: int = 0
    manager: str = ""
    is_planned: bool = False
    is_last_dying: bool = False

    def to_json(self) -> str:
        values = asdict(self) | {
            "config": self.config.model_dump(mode="json"),
            "mountpoint": str(self.mountpoint),
            "init_request": self.init_request.hex(),
            "init_answer": self.init_answer.hex(),
        }
        return json.dumps(values)

    @classmethod
    def from_json(cls, text: str) -> Handover:
        """Return what `to_json` made, also in another version: what is not known here is left out."""
        values = json.loads(text)
        known = {one.name: values[one.name] for one in fields(cls) if one.name in values}
        return cls(
            **known
            | {
                "config": _config_of(values["config"]),
                "source": ConfigSource(**values["source"]),
                "mountpoint": Path(values["mountpoint"]),
                "init_request": bytes.fromhex(values["init_request"]),
                "init_answer": bytes.fromhex(values["init_answer"]),
            }
        )

    def with_config(self, config_json: str) -> Handover:
        """Return a copy with the configuration that a planned daemon has read."""
        return replace(self, config=_config_of(json.loads(config_json)))

    def to_memory(self) -> int:
        """Return the descriptor of a memory file with `to_json`."""
        fd = os.memfd_create("lazyimg-handover")
        os.write(fd, self.to_json().encode())
        return fd

    @classmethod
    def from_memory(cls, fd: int) -> Handover:
        return cls.from_json(os.pread(fd, os.fstat(fd).st_size, 0).decode())


def _config_of(values: Mapping[str, Any]) -> Config:
    """Return a configuration that another version of this program may have written."""
    known = {key: value for key, value in values.items() if key in Config.model_fields}
    try:
        return Config(**known)
    except ValueError as exc:
        raise ConfigError(f"the configuration handed over does not fit this version: {exc}") from exc
