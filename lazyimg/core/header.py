"""May this image be shown, and as what: a verdict on the first bytes of its source.

Pure.  The bytes are judged by oslo.utils' format_inspector, which Nova, Glance and Cinder trust, by Nova's
rules (nova.virt.images.do_image_deep_inspection).  Guards "qemu is never left to guess a format; an unsafe or
mislabelled header is never presented".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, cast

from lazyimg.core.identity import ImageRecord
from lazyimg.core.qcow2 import parse_header
from lazyimg.errors import ImageRefused

if TYPE_CHECKING:
    from oslo_utils.imageutils.format_inspector import FileInspector

# The farthest signature any inspector needs is an ISO's, at 32 KiB; a qcow2 header is in its first cluster.
HEAD_SIZE_BYTES = 1 << 20
# As Nova feeds the inspectors; regions that are found while reading must lie in what comes later.
_STEP_BYTES = 4096

# qemu reads zeros past a file's end: a header in a file of 200 bytes is one for it, but an inspector that
# lacks its 512 bytes (LUKS: 592) would say "no match".
_PADDED_BYTES = 1024

AMI_FORMATS = frozenset({"ami", "aki", "ari"})
KERNEL_FORMATS = frozenset({"aki", "ari"})
# What may be found in content of each disk_format; "gpt" is the inspector's name for MBR and GPT alike.
_CONTENT_ALLOWED: dict[str, frozenset[frozenset[str]]] = {
    "raw": frozenset({frozenset({"raw"}), frozenset({"gpt"})}),
    # A bootable ISO has a partition table in front.
    "iso": frozenset({frozenset({"iso"}), frozenset({"iso", "gpt"})}),
    "qcow2": frozenset({frozenset({"qcow2"})}),
    **{
        name: frozenset(
            {frozenset({"raw"}), frozenset({"gpt"}), frozenset({"iso"}), frozenset({"iso", "gpt"})}
        )
        for name in AMI_FORMATS
    },
}
_CONVERT = "convert it to raw or qcow2 with qemu-img and upload that"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The image may be presented.

    presented_format: what qemu must be told the presented bytes are, "raw" or "qcow2".
    virtual_size_bytes: what the guest sees.  cluster_size_bytes: the source's, None unless it is qcow2.
    """

    presented_format: str
    virtual_size_bytes: int
    cluster_size_bytes: int | None = None


def judge(head: bytes, record: ImageRecord, view: str) -> Verdict:
    """Return how to present an image in `view` ("stored" or "raw") whose source begins with `head`.

    head: the source's first `min(size, HEAD_SIZE_BYTES)` bytes; more is not looked at.
    Raises ImageRefused, and nothing else, naming the image, the reason and the next step.
    """
    disk_format, size_bytes = judge_record(record)
    needed_bytes = min(size_bytes, HEAD_SIZE_BYTES)
    if len(head) < needed_bytes:
        raise _refused(record, f"only {len(head)} of its first {needed_bytes} bytes are known", "try again")
    head = head[:HEAD_SIZE_BYTES].ljust(_PADDED_BYTES, b"\0")
    try:
        found = _inspect(head)
        names = frozenset(str(inspector) for inspector in found)
    except Exception as exc:  # an inspector that trips over hostile bytes has judged them
        raise _refused(record, f"its header cannot be read ({type(exc).__name__})", _CONVERT) from exc
    if names not in _CONTENT_ALLOWED[disk_format]:
        content = "+".join(sorted(names))
        raise _refused(
            record, f"its disk_format is {disk_format}, its content is {content}", "upload it as what it is"
        )
    if disk_format != "qcow2" or view != "raw":
        # Decoded here, a qcow2 is opened by nobody else: its header alone decides.
        for inspector in found:
            _check_safety(inspector, record)
    if disk_format != "qcow2":
        return Verdict("raw", size_bytes)
    try:
        header = parse_header(head, size_bytes)
    except ImageRefused as exc:
        raise ImageRefused(f"image {record.id}: {exc}") from exc
    presented_format = "raw" if view == "raw" else "qcow2"
    return Verdict(presented_format, header.virtual_size_bytes, header.cluster_size_bytes)


def is_decoded(record: ImageRecord, view: str) -> bool:
    """True if the image's presented bytes are decoded from its source, and not the source itself."""
    return view == "raw" and record.disk_format == "qcow2"


def as_raw(record: ImageRecord, size_bytes: int) -> ImageRecord:
    """Return the record of a decoded image's presented bytes, of which there are `size_bytes`, for `judge`."""
    return replace(record, disk_format="raw", container_format="bare", size_bytes=size_bytes)


def _refused(record: ImageRecord, reason: str, next_step: str) -> ImageRefused:
    return ImageRefused(f"image {record.id}: {reason}; {next_step}")


def judge_record(record: ImageRecord) -> tuple[str, int]:
    """Return disk_format and size of a record that may be presented, as far as the record alone tells.

    Raises ImageRefused.
    """
    disk_format, size_bytes = record.disk_format, record.size_bytes
    if disk_format is None or size_bytes is None:
        raise _refused(
            record, "Glance knows no disk_format or size of it", "wait until its upload is complete"
        )
    if disk_format not in _CONTENT_ALLOWED:
        raise _refused(record, f"disk_format {disk_format} cannot be presented", _CONVERT)
    containers = {None, "bare"}
    if disk_format in AMI_FORMATS:
        containers.add(disk_format)
    if record.container_format not in containers:
        raise _refused(
            record,
            f"container_format {record.container_format} wraps its {disk_format} bytes",
            "upload the disk itself with container_format bare",
        )
    return disk_format, size_bytes


def _inspect(head: bytes) -> list[FileInspector]:
    """Return the inspectors that recognise `head`: one, or several for a file that is several things."""
    # Imported here: a tenth of a second that the command line's other commands need not pay.
    from oslo_utils.imageutils import format_inspector

    steps = (head[start : start + _STEP_BYTES] for start in range(0, len(head), _STEP_BYTES))
    # It takes any iterator of chunks, though its annotation says file.
    wrapper = format_inspector.InspectWrapper(cast(IO[bytes], steps))
    for _ in wrapper:
        pass
    return wrapper.formats or []


def _check_safety(inspector: FileInspector, record: ImageRecord) -> None:
    if record.disk_format in KERNEL_FORMATS and str(inspector) == "gpt":
        # A bzImage ends its first sector with 0x55AA (Linux boot protocol); that is no partition table.
        return
    try:
        inspector.safety_check()
    except Exception as exc:
        failures = getattr(exc, "failures", None) or {"header": exc}
        reason = ", ".join(f"{name}: {failure}" for name, failure in sorted(failures.items()))
        raise _refused(record, f"it is not safe to open ({reason})", _CONVERT) from exc
