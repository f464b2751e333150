"""qcow2 reading held to a model: random images, read in random order with little room for tables."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from qcow2_reader import SourceReader
from qcow2_writer import Geometry, Kind, write_image

from lazyimg.core.qcow2 import Data, Zero

MIB = 1 << 20


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    """Any kind of image, of up to six L2 tables where those are small: more than are kept."""
    version = draw(st.sampled_from((2, 3)))
    has_subclusters = version == 3 and draw(st.booleans())
    cluster_bits = draw(st.sampled_from((14, 16) if has_subclusters else (9, 10, 12, 16)))
    is_zstd = version == 3 and draw(st.booleans())
    geometry = Geometry(version, cluster_bits, 0, has_subclusters, "zstd" if is_zstd else "deflate")
    span = geometry.entries * geometry.cluster_bytes
    geometry.virtual_size_bytes = draw(st.integers(1, 6 * span // 512)) * 512
    return geometry


@st.composite
def guests(draw: st.DrawFn, geometry: Geometry) -> dict[int, Kind]:
    """What some clusters are; runs of neighbours, so that merging has something to do."""
    guest: dict[int, Kind] = {}
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, geometry.clusters - 1))
        kinds = draw(st.lists(st.sampled_from(geometry.kinds), min_size=1, max_size=5))
        guest.update({i: kind for i, kind in enumerate(kinds, first) if i < geometry.clusters})
    return guest


@given(st.data())
def test_any_range_of_any_image_reads_as_written(data: st.DataObject) -> None:
    """Whatever was written is read, range by range in any order, while tables come and go."""
    geometry = data.draw(geometries())
    guest = data.draw(guests(geometry))
    image = write_image(geometry, guest, data.draw(st.integers(0, 1 << 16)))
    reader = SourceReader(image.source, tables_bytes_max=0)
    sectors = geometry.virtual_size_bytes // 512
    places = [0, sectors - 1, *(index * geometry.cluster_bytes // 512 for index in guest)]
    near = st.builds(
        lambda place, by: min(max(place + by, 0), sectors), st.sampled_from(places), st.integers(-200, 200)
    )
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(near) * 512 + data.draw(st.sampled_from((0, 1, 511)))
        longest = min(MIB, reader.mapping.mappable_bytes_max)
        stop = min(start + data.draw(st.integers(0, longest)), geometry.virtual_size_bytes)
        start = min(start, stop)
        assert reader.read(start, stop) == image.read(start, stop)


@given(st.data())
def test_extents_are_as_long_as_they_can_be(data: st.DataObject) -> None:
    """No two neighbouring extents could be one, and zeros ask for nothing."""
    geometry = data.draw(geometries())
    guest = data.draw(guests(geometry))
    image = write_image(geometry, guest, data.draw(st.integers(0, 1 << 16)))
    reader = SourceReader(image.source, tables_bytes_max=64 * MIB)
    extents = reader.all_extents()
    for one, other in pairwise(extents):
        assert not (isinstance(one, Zero) and isinstance(other, Zero))
        if isinstance(one, Data) and isinstance(other, Data):
            assert one.source_start + one.stop - one.start != other.source_start
    for extent in extents:
        if isinstance(extent, Zero):
            step = max((extent.stop - extent.start) // 4, 1)
            for place in range(extent.start, extent.stop, step):
                assert image.read(place, place + 1) == b"\0"


@given(st.data())
def test_file_that_ends_within_its_last_cluster_reads_zeros_there(data: st.DataObject) -> None:
    """A source may lack the end of its last cluster; qemu reads zeros, and so do we."""
    image = write_image(Geometry(cluster_bits=12, virtual_size_bytes=8192), {0: "data", 1: "data"}, 5)
    last = max(
        (extent for extent in SourceReader(image.source).all_extents() if isinstance(extent, Data)),
        key=lambda extent: extent.source_start,
    )
    cut = data.draw(st.integers(0, 4095))
    stop = last.source_start + last.stop - last.start
    assert stop == len(image.source), "with this seed a data cluster lies last"
    reader = SourceReader(image.source[: len(image.source) - cut])
    expected = bytearray(image.read(0, 8192))
    expected[last.stop - cut : last.stop] = bytes(cut)
    assert reader.read_all() == bytes(expected)
