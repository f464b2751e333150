"""System calls that Python's `os` lacks; each does what its manual page says and raises OSError.

Credentials and umask belong to a thread here, not to the process: what `creating_as` changes, no other thread
sees, and it is all changed back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
from collections.abc import Iterator

# <linux/fs.h>
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_AT_EMPTY_PATH = 0x1000
_CLONE_FS = 0x200
_SYNC_FILE_RANGE_WRITE = 2
_UTIME_OMIT = (1 << 30) - 2
# <linux/capability.h>: the header of version 3, for the calling thread, then two sets of three words.
_CAPABILITY_VERSION = 0x20080522
# A kernel's handle is at most MAX_HANDLE_SZ bytes.
_HANDLE_BYTES_MAX = 128
# uid_t and gid_t are unsigned; ctypes takes what the calls return for signed.
_ID_MASK = 0xFFFFFFFF
# Whether this thread has an umask of its own.
_thread = threading.local()


class _FileHandle(ctypes.Structure):
    _fields_ = (
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * _HANDLE_BYTES_MAX),
    )


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_Timespecs = _Timespec * 2
_CapabilityHeader = ctypes.c_uint32 * 2
_CapabilitySets = ctypes.c_uint32 * 6


def file_handle(fd: int) -> bytes:
    """Return what tells this file from every other of its file system, past and to come; b"" if nothing does.

    Inode numbers are given again after a deletion, file handles are not: they hold a generation
    (name_to_handle_at(2)).
    """
    handle = _FileHandle(handle_bytes=_HANDLE_BYTES_MAX)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount_id), _AT_EMPTY_PATH):
        # Some file systems, overlayfs for one, have no handles.
        return b""
    return bytes(handle.f_handle[: handle.handle_bytes])


def rename(old_folder_fd: int, old: bytes, new_folder_fd: int, new: bytes, flags: int) -> None:
    """renameat2(2)."""
    _check(_libc.renameat2(old_folder_fd, old, new_folder_fd, new, ctypes.c_uint(flags)))


def set_times(path: str, atime_ns: int | None, mtime_ns: int | None) -> None:
    """Set one or both times of a file, None leaving one as it is (utimensat(2))."""
    times = _Timespecs(_timespec(atime_ns), _timespec(mtime_ns))
    _check(_libc.utimensat(-1, os.fsencode(path), times, 0))


def begin_writing_out(fd: int, start: int, stop: int) -> None:
    """Begin to write `[start, stop)` of a file to disk, which makes nothing durable (sync_file_range(2))."""
    _check(_libc.sync_file_range(fd, start, stop - start, _SYNC_FILE_RANGE_WRITE))


@contextlib.contextmanager
def creating_as(uid: int, gid: int) -> Iterator[None]:
    """In this thread, for the block, what is created is this user's and group's, with exactly the mode asked for.

    Permissions are not this user's but stay the daemon's: the kernel has checked them on the caller's own
    credentials (default_permissions), which the daemon could not get at from another PID namespace.  Raises
    PermissionError if the daemon may not create for that user.
    """
    if not getattr(_thread, "has_own_umask", False):
        _check(_libc.unshare(_CLONE_FS))
        _thread.has_own_umask = True
    own_uid, own_gid = os.geteuid(), os.getegid()
    capabilities = _capabilities()
    umask = os.umask(0)
    try:
        _set_ids(uid, gid)
        # A change of fsuid from 0 took those that override permissions (capabilities(7)).
        _set_capabilities(capabilities)
        yield
    finally:
        os.umask(umask)
        _libc.setfsuid(own_uid)
        _libc.setfsgid(own_gid)
        _set_capabilities(capabilities)


def _set_ids(uid: int, gid: int) -> None:
    _libc.setfsgid(gid)
    _libc.setfsuid(uid)
    # Neither tells whether it worked; asked for an impossible id, each says which one holds.
    holding = _libc.setfsuid(-1) & _ID_MASK, _libc.setfsgid(-1) & _ID_MASK
    if holding != (uid, gid):
        raise PermissionError(errno.EPERM, f"the daemon may not create files of user {uid}")


def _capabilities() -> ctypes.Array[ctypes.c_uint32]:
    sets = _CapabilitySets()
    _check(_libc.capget(_CapabilityHeader(_CAPABILITY_VERSION, 0), sets))
    return sets


def _set_capabilities(sets: ctypes.Array[ctypes.c_uint32]) -> None:
    _check(_libc.capset(_CapabilityHeader(_CAPABILITY_VERSION, 0), sets))


def _timespec(time_ns: int | None) -> _Timespec:
    if time_ns is None:
        return _Timespec(0, _UTIME_OMIT)
    return _Timespec(*divmod(time_ns, 10**9))


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
