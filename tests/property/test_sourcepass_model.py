"""A pass over a qcow2 source held to a model: what is right is found right, and what is changed is found."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from qcow2_writer import Geometry, Image, Kind, write_image
from store_images import image_entry

from lazyimg.core.header import HEAD_SIZE_BYTES
from lazyimg.image.sourcepass import SourcePass


class Stored:
    """An image as it is stored, changed where the test says."""

    def __init__(self, image: Image) -> None:
        self.presented = bytearray(image.read(0, image.geometry.virtual_size_bytes))
        self.source = bytearray(image.source)

    def stored(self, start: int, stop: int) -> bytes:
        return bytes(self.presented[start:stop])

    def table(self, start: int, stop: int) -> bytes | None:
        return bytes(self.source[start:stop])


@st.composite
def images(draw: st.DrawFn) -> Image:
    has_subclusters = draw(st.booleans())
    cluster_bits = draw(st.sampled_from((14, 17) if has_subclusters else (9, 12, 16, 18)))
    size_bytes = draw(st.integers(1, 5 * 128)) * 512
    geometry = Geometry(3, cluster_bits, size_bytes, has_subclusters)
    guest: dict[int, Kind] = {}
    for _ in range(draw(st.integers(0, 5))):
        first = draw(st.integers(0, geometry.clusters - 1))
        kinds = draw(st.lists(st.sampled_from(geometry.kinds), min_size=1, max_size=20))
        guest |= {i: kind for i, kind in enumerate(kinds, first) if i < geometry.clusters}
    return write_image(geometry, guest, draw(st.integers(0, 1 << 16)))


def passed(image: Image, stored: Stored, data: st.DataObject) -> SourcePass:
    """Make a pass over the source, in steps and with a memory of any size."""
    record = replace(
        image_entry(1, len(image.source)).record,
        disk_format="qcow2",
        os_hash_algo="sha512",
        os_hash_value=hashlib.sha512(image.source).hexdigest(),
    )
    one = SourcePass(record, stored, pieces_max=data.draw(st.sampled_from((10, 40, 1000))))
    step_bytes = data.draw(st.integers(len(image.source) // 20 + 1, len(image.source)))
    while not one.is_over:
        if one.fed_stop == one.planned_stop:
            for _ in one.plan():
                pass
        stop = min(one.planned_stop, one.fed_stop + step_bytes)
        one.feed(image.source[one.fed_stop : stop])
    assert one.hexdigest() == record.os_hash_value
    return one


@settings(max_examples=40)
@given(images(), st.data())
def test_what_is_right_is_found_right(image: Image, data: st.DataObject) -> None:
    """However its clusters lie, and however little is remembered, a right image differs nowhere."""
    assert passed(image, Stored(image), data).difference is None


@settings(max_examples=40)
@given(images(), st.data())
def test_any_changed_byte_is_found(image: Image, data: st.DataObject) -> None:
    """[I1] One wrong byte of what is presented, data or zeros, is a difference."""
    stored = Stored(image)
    at = data.draw(st.integers(0, len(stored.presented) - 1))
    stored.presented[at] ^= data.draw(st.integers(1, 255))
    difference = passed(image, stored, data).difference
    assert difference is not None
    start, stop = map(int, difference.removeprefix("bytes ").partition(":")[0].split(" to "))
    assert start <= at < stop


@settings(max_examples=40)
@given(images(), st.data())
def test_changed_header_is_found(image: Image, data: st.DataObject) -> None:
    """[I1] A header kept here that is another in the source is a difference, though all else agrees."""
    stored = Stored(image)
    # The name of a feature that is not used: it changes how nothing is read.
    at = min(len(image.source), HEAD_SIZE_BYTES, image.geometry.cluster_bytes) - 1
    stored.source[at] ^= 1
    assert "a table that is another" in (passed(image, stored, data).difference or "")
