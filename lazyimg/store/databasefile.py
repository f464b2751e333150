"""SQLite's file as a file: whether it is whole, and what its errors say of the disk.  Functions block."""

from __future__ import annotations

import errno
import os
import sqlite3
import struct
from contextlib import closing, suppress
from pathlib import Path

# sqlite.org/fileformat.html, "The Database Header": bytes a page, at 16, and pages, at 28.
_HEADER = struct.Struct(">16xH10xI")
# 1 stands for what 16 bits do not hold.
_PAGE_BYTES_MAX = 65536
# What SQLite's primary result codes say of the disk; all others are EIO.
_ERRNO = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_READONLY: errno.EROFS}


def is_cut_short(path: Path) -> bool:
    """True if the file has fewer pages than its header says; SQLite finds out only when it looks for one that is gone.

    SQLite itself, killed while it wrote its log back, may have left the file so: `problem_of` knows.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        header = file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return bool(header)
        page_bytes, pages = _HEADER.unpack(header)
        page_bytes = page_bytes if page_bytes > 1 else _PAGE_BYTES_MAX
        return bool(pages * page_bytes > os.fstat(file.fileno()).st_size)
    return False


def problem_of(path: Path) -> str:
    """Read all of the database, and its log; return what is wrong, "" for nothing.  Raises sqlite3.Error."""
    with closing(sqlite3.connect(path)) as connection:
        (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    return "" if found == "ok" else str(found)


def errno_of(exc: Exception) -> int:
    """Return the errno of an error of SQLite's, or of one that is raised in its place."""
    return _ERRNO.get(_primary_code(exc), errno.EIO)


def is_corrupt(exc: Exception) -> bool:
    """True if SQLite takes the file for corrupt, or for none of its own."""
    return _primary_code(exc) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _primary_code(exc: Exception) -> int:
    # The low byte; the rest tells variants of it apart (sqlite.org/rescode.html, "Primary Result Codes").
    # diskcache calls whatever fails a transaction's begin a timeout, and SQLite's own error its context.
    cause = exc if isinstance(exc, sqlite3.Error) else exc.__context__
    return int(getattr(cause, "sqlite_errorcode", 0)) & 0xFF
