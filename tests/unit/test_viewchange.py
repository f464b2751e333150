"""A change of `view` under overlays is refused, and one that harms nobody is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from store_images import image_entry

from lazyimg.errors import ConfigError
from lazyimg.image.viewchange import NAMED_MAX, refuse_change
from lazyimg.store.entry import ImageEntry


def entry(number: int, *, view: str = "raw", disk_format: str = "qcow2", in_use: bool = True) -> ImageEntry:
    one = image_entry(number, 1000)
    return replace(one, record=replace(one.record, disk_format=disk_format), view=view, in_use=in_use)


@pytest.mark.parametrize(("view", "other"), [("raw", "stored"), ("stored", "raw")])
def test_change_under_images_in_use_is_refused(view: str, other: str) -> None:
    """[I1] A qcow2 in use in one view does not start in the other; the line names it and says what to do."""
    used = entry(1, view=view)
    refuse_change([used], view)
    with pytest.raises(ConfigError, match=rf"{used.record.id}.*start with that view.*\(rm\)"):
        refuse_change([used], other)


def test_refusal_is_one_line_however_many_images() -> None:
    """Some images are named, the others counted."""
    with pytest.raises(ConfigError, match="and 3 more") as caught:
        refuse_change([entry(number) for number in range(NAMED_MAX + 3)], "stored")
    assert "\n" not in str(caught.value)


def test_change_that_harms_nobody_is_taken() -> None:
    """Images that are raw in both views, or whose use here has ended, are in nobody's way."""
    refuse_change(
        [entry(1, disk_format="raw"), entry(2, disk_format="iso"), entry(3, in_use=False)], "stored"
    )
