"""The client that a configuration asks for: the daemon's, and the doctor's."""

from __future__ import annotations

from lazyimg.config import Config
from lazyimg.core.pace import SLOW_STREAMS_MAX
from lazyimg.glance.auth import Auth
from lazyimg.glance.client import GlanceClient


def make_glance(config: Config, auth: Auth) -> GlanceClient:
    """Return a client that logs in as `auth` does; it asks nothing yet."""
    return GlanceClient(
        auth,
        connect_timeout_s=config.connect_timeout,
        first_byte_timeout_s=config.first_byte_timeout,
        between_bytes_timeout_s=config.between_bytes_timeout,
        # Records and lists are asked while all flights are out, and all streams that have no slot.
        connections_max=config.requests_max + config.background_requests_max + SLOW_STREAMS_MAX,
        retry_pause_max_s=config.retry_pause_max,
        hedge=config.hedge,
    )
