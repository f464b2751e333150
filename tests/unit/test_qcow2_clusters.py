"""Compressed clusters: what qemu would decode is decoded, and nothing takes more than a cluster's memory."""

from __future__ import annotations

import random
import struct
import tracemalloc
import zlib

import pytest
from backports import zstd
from qcow2_writer import Geometry, write_image

from lazyimg.core.qcow2 import Header, decode_cluster, parse_header
from lazyimg.errors import SourceDamaged

CLUSTER = random.Random(5).randbytes(1024) * 4


def header(compression: str) -> Header:
    assert compression in ("deflate", "zstd")
    geometry = Geometry(cluster_bits=12, compression="zstd" if compression == "zstd" else "deflate")
    source = write_image(geometry, {}, seed=1).source
    return parse_header(source, len(source))


def deflated(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-12)
    return packer.compress(data) + packer.flush()


PACK = {"deflate": deflated, "zstd": zstd.compress}


@pytest.mark.parametrize("compression", PACK)
def test_what_follows_a_compressed_cluster_is_ignored(compression: str) -> None:
    """The source range is rounded to sectors: other clusters' bytes may follow the stream."""
    packed = PACK[compression](CLUSTER)
    for garbage in (b"", b"\0" * 300, packed, b"\xff" * 511):
        assert decode_cluster(header(compression), packed + garbage) == CLUSTER


@pytest.mark.parametrize("compression", PACK)
def test_cluster_that_cannot_be_decoded_is_damaged(compression: str) -> None:
    """A stream that is empty, cut, too short or garbage is damaged."""
    packed = PACK[compression](CLUSTER)
    for data in (b"", packed[:-1000], packed[:1], PACK[compression](CLUSTER[:-1]), b"\xff" * 4096):
        with pytest.raises(SourceDamaged):
            decode_cluster(header(compression), data)


def test_deflate_stream_that_goes_on_is_cut_as_qemu_cuts_it() -> None:
    """qemu inflates into a cluster and stops: the rest of a longer stream is nobody's."""
    assert decode_cluster(header("deflate"), deflated(CLUSTER + b"more")) == CLUSTER


def test_zstd_frame_that_holds_more_is_damaged() -> None:
    """qemu demands that the frame ends with the cluster."""
    with pytest.raises(SourceDamaged, match="more than 4096"):
        decode_cluster(header("zstd"), zstd.compress(CLUSTER + b"more"))


def test_zstd_cluster_may_be_in_several_frames() -> None:
    """qemu reads frames until the cluster is full; skippable ones hold nothing."""
    skippable = struct.pack("<II", 0x184D2A50, 5) + b"12345"
    frames = skippable + zstd.compress(CLUSTER[:1000]) + zstd.compress(CLUSTER[1000:])
    assert decode_cluster(header("zstd"), frames + b"garbage") == CLUSTER


@pytest.mark.parametrize("compression", PACK)
def test_bomb_takes_no_memory(compression: str) -> None:
    """A stream of 64 MiB of zeros makes no more than a cluster before it is cut or damaged."""
    bomb = PACK[compression](bytes(64 << 20))
    tracemalloc.start()
    try:
        if compression == "deflate":
            assert decode_cluster(header(compression), bomb) == bytes(4096)
        else:
            with pytest.raises(SourceDamaged):
                decode_cluster(header(compression), bomb)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The decoder's own state, and what it has not read of its input; the bomb itself is no larger.
    assert peak_bytes < len(bomb) + (128 << 10)


def test_endless_empty_frames_are_damaged() -> None:
    """Frames that hold nothing are not read without end."""
    with pytest.raises(SourceDamaged, match="frames"):
        decode_cluster(header("zstd"), zstd.compress(b"") * 100_000)


def test_zstd_window_beyond_qemus_limit_is_damaged() -> None:
    """A frame that asks for a window of 2 GiB gets none."""
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, 21 << 3]) + b"\x01\x00\x00"
    with pytest.raises(SourceDamaged, match="memory"):
        decode_cluster(header("zstd"), frame)
