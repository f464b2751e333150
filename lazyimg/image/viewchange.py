"""What a change of `view` would do to guests: overlays name their base's format, and would read nonsense."""

from __future__ import annotations

from collections.abc import Iterable

from lazyimg.core.header import is_decoded
from lazyimg.errors import ConfigError
from lazyimg.store.entry import ImageEntry

# Named in the refusal; the rest are counted.
NAMED_MAX = 5


def refuse_change(entries: Iterable[ImageEntry], view: str) -> None:
    """Raise ConfigError where an image is in use here with other bytes than `view` would show."""
    others = [e for e in entries if e.in_use and e.view != view and _differs(e)]
    if not others:
        return
    names = ", ".join(f"{e.record.id} ({e.record.base_name})" for e in others[:NAMED_MAX])
    more = f" and {len(others) - NAMED_MAX} more" if len(others) > NAMED_MAX else ""
    raise ConfigError(
        f"config key 'view': these images are in use here with view = {others[0].view!r}, and overlays on them would "
        f"read nonsense: {names}{more}; start with that view, remove or flatten their overlays and remove the images' "
        "names from the mount (rm), then change it"
    )


def _differs(entry: ImageEntry) -> bool:
    return any(is_decoded(entry.record, view) for view in ("raw", "stored"))
