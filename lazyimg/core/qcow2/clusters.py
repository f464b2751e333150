"""Decoding one compressed cluster.

Pure and bounded: no input makes more than a cluster and one byte, and zstd's window is at most 128 MiB of address
space (libzstd's default limit, and qemu's), of which only what is decoded is touched.  Both libraries let other threads
run meanwhile.
"""

from __future__ import annotations

import sys

from isal import isal_zlib

from lazyimg.core.qcow2.header import Header
from lazyimg.errors import SourceDamaged

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# The spec asks writers for a window of 2^12; readers that take 2^15, deflate's largest, accept whatever qemu
# accepts: it inflates in one piece, where zlib does not enforce the smaller one.
_DEFLATE_WINDOW_BITS = 15
# qemu writes one frame and reads several (block/qcow2-threads.c).  Each costs a decoder: hostile ones of 9 bytes
# would cost seconds a cluster.
_ZSTD_FRAMES_MAX = 64


def decode_cluster(header: Header, data: bytes) -> bytes:
    """Return the `cluster_size_bytes` that a compressed cluster holds.

    data: the source bytes of its extent; what follows the compressed stream in the last sector is ignored.
    Raises SourceDamaged for anything that qemu would not decode.
    """
    decode = _inflate if header.compression == "deflate" else _decode_zstd
    try:
        cluster = decode(data, header.cluster_size_bytes)
    except (isal_zlib.error, zstd.ZstdError) as exc:  # type: ignore[misc]  # its stub has an instance there
        raise _damaged(f"cannot be decoded ({exc})") from exc
    if len(cluster) != header.cluster_size_bytes:
        raise _damaged(f"holds {len(cluster)} of {header.cluster_size_bytes} bytes")
    return cluster


def _damaged(reason: str) -> SourceDamaged:
    return SourceDamaged(
        f"a compressed cluster of its qcow2 {reason}; check it with qemu-img check and upload it again"
    )


def _inflate(data: bytes, size_bytes: int) -> bytes:
    """Return the first `size_bytes` of a raw deflate stream; as qemu, do not ask whether it ends there."""
    return isal_zlib.decompressobj(-_DEFLATE_WINDOW_BITS).decompress(data, size_bytes)


def _decode_zstd(data: bytes, size_bytes: int) -> bytes:
    """Return what the frames hold that make up `size_bytes`; as qemu, demand that the last one ends there."""
    cluster = b""
    for _ in range(_ZSTD_FRAMES_MAX):
        frame = zstd.ZstdDecompressor()
        # One byte more than there is room for shows a frame that holds too much.
        cluster += frame.decompress(data, size_bytes - len(cluster) + 1)
        if len(cluster) > size_bytes:
            raise _damaged(f"holds more than {size_bytes} bytes")
        if not frame.eof:
            raise _damaged("is cut short")
        if len(cluster) == size_bytes:
            return cluster
        data = frame.unused_data
    raise _damaged(f"is in more than {_ZSTD_FRAMES_MAX} frames")
