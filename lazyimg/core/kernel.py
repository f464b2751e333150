"""What a Linux release can do, by its number."""

from __future__ import annotations

import re

# FUSE_NOTIFY_RESEND: what a killed daemon had taken is sent to the next one.
RESENDS_SINCE = (6, 9)


def can_resend(release: str) -> bool:
    """True if this kernel (uname -r) sends again what a killed daemon had taken: no request is lost with it."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return found is not None and (int(found[1]), int(found[2])) >= RESENDS_SINCE
