"""What may lie on a disk after power was lost, built from the record of what was written to it (passthrough_fs.py).

The disk is as unkind as POSIX allows:

    write, truncate             durable after fsync of that file; before, each is kept or dropped for itself, in any
                                combination, whole or in sectors of 512 or 4096 bytes; a file may have grown by bytes
                                that were never written, zeros or rubbish
    create, rename, unlink, …   durable after fsync of the folder, a rename after fsync of both; before, each is kept
                                or dropped for itself
    fsync of a file             does not make its name durable

`CrashDisk.play` goes through a record; `CrashDisk.crash` gives one state the disk could be in if power was lost
now.  States are chosen with a random generator of the caller's, so that a seed repeats them.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128

ROOT = 1
SECTORS = (512, 4096)

# What becomes of the writes and names that no fsync has made durable.
Fate = Literal["kept", "dropped", "last kept", "last dropped", "mixed", "torn"]
FATES: tuple[Fate, ...] = ("kept", "dropped", "last kept", "last dropped", "mixed", "torn")
Record = tuple[Any, ...]
# A file's content, or a folder's.
Tree = dict[str, "bytes | Tree"]


@dataclass(slots=True)
class _File:
    content: bytearray = field(default_factory=bytearray)
    # Writes and truncations that no fsync has followed.
    pending: list[Record] = field(default_factory=list)


@dataclass(slots=True)
class _Naming:
    """A change of names, and the folders that must be synced before it is durable."""

    record: Record
    unsynced: set[int]


class CrashDisk:
    """The recorded disk at one moment: what is durable, and what is pending."""

    def __init__(self) -> None:
        self._files: dict[int, _File] = {}
        self._folders: dict[int, dict[str, int]] = {ROOT: {}}
        self._namings: list[_Naming] = []

    @property
    def pending_count(self) -> int:
        """Changes that power loss could take back."""
        return sum(len(file.pending) for file in self._files.values()) + len(self._namings)

    def play(self, record: Record) -> None:
        """Go on by one recorded operation."""
        match record:
            case ("create", _, _, node):
                # O_CREAT of a file that is there is recorded too.
                if node not in self._files:
                    self._files[node] = _File()
                    self._namings.append(_Naming(record, {record[1]}))
            case ("mkdir", parent, _, node):
                self._folders[node] = {}
                self._namings.append(_Naming(record, {parent}))
            case ("link" | "unlink" | "rmdir", parent, _, _):
                self._namings.append(_Naming(record, {parent}))
            case ("rename", parent, _, new_parent, _, _):
                self._namings.append(_Naming(record, {parent, new_parent}))
            case ("write" | "truncate", node, *_):
                self._files[node].pending.append(record)
            case ("fsync", node):
                file = self._files[node]
                for one in file.pending:
                    _apply(file.content, one)
                file.pending.clear()
            case ("fsyncdir", node):
                for naming in self._namings:
                    naming.unsynced.discard(node)
                # In their order: what precedes a change that is durable is settled before it.
                while self._namings and not self._namings[0].unsynced:
                    _rename(self._folders, self._namings.pop(0).record)
            case ("mark", _):
                return
            case _:
                raise AssertionError(f"no operation: {record}")

    def crash(self, fate: Fate, rng: random.Random) -> Tree:
        """Return what lies on the disk if power is lost now."""
        folders = {node: dict(entries) for node, entries in self._folders.items()}
        kept = [bool(choice) for choice in _choose(len(self._namings), fate, rng)]
        for naming, is_kept in zip(self._namings, kept, strict=True):
            if is_kept or not naming.unsynced:
                _rename(folders, naming.record)
        return self._tree(ROOT, folders, fate, rng)

    def _tree(
        self, node: int, folders: Mapping[int, Mapping[str, int]], fate: Fate, rng: random.Random
    ) -> Tree:
        tree: Tree = {}
        for name, child in sorted(folders[node].items()):
            if child in folders:
                tree[name] = self._tree(child, folders, fate, rng)
            else:
                tree[name] = self._content(self._files[child], fate, rng)
        return tree

    def _content(self, file: _File, fate: Fate, rng: random.Random) -> bytes:
        content = bytearray(file.content)
        for record, choice in zip(file.pending, _choose(len(file.pending), fate, rng), strict=True):
            if choice == "torn" and record[0] == "write":
                _tear(content, record, rng)
            elif choice:
                _apply(content, record)
        return bytes(content)


def digest(tree: Tree) -> bytes:
    """Return what tells a state from every other."""
    hashed = xxh3_128()
    for name, one in tree.items():
        hashed.update(name.encode() + b"\0" + (one if isinstance(one, bytes) else b"\0" + digest(one)))
        hashed.update(len(one).to_bytes(8, "little"))
    return hashed.digest()


def write_tree(tree: Tree, folder: Path) -> None:
    """Make a state real, in a new folder."""
    folder.mkdir(mode=0o700)
    for name, one in tree.items():
        if isinstance(one, bytes):
            fd = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                os.write(fd, one)
            finally:
                os.close(fd)
        else:
            write_tree(one, folder / name)


def _choose(count: int, fate: Fate, rng: random.Random) -> Iterator[bool | Literal["torn"]]:
    """Yield what becomes of each of `count` pending changes of one file, or of names."""
    for at in range(count):
        match fate:
            case "kept" | "dropped":
                yield fate == "kept"
            case "last kept" | "last dropped":
                yield (at == count - 1) == (fate == "last kept")
            case "mixed":
                yield rng.random() < 0.5
            case "torn":
                yield rng.choice((True, False, "torn"))


def _apply(content: bytearray, record: Record) -> None:
    match record:
        case ("truncate", _, size_bytes):
            del content[size_bytes:]
            content.extend(bytes(size_bytes - len(content)))
        case ("write", _, start, data):
            content.extend(bytes(max(start - len(content), 0)))
            content[start : start + len(data)] = data


def _tear(content: bytearray, record: Record, rng: random.Random) -> None:
    """Write some sectors of a write; where the file would have grown, it may have grown by rubbish."""
    _, _, start, data = record
    growth_bytes = max(start + len(data) - len(content), 0)
    if rng.random() < 0.5:
        content.extend(bytes(growth_bytes) if rng.random() < 0.5 else rng.randbytes(growth_bytes))
    sector = rng.choice(SECTORS)
    first_only = rng.random() < 0.5
    at = 0
    while at < len(data):
        # Sectors are where the disk has them, not where the write begins.
        stop = min(at + sector - (start + at) % sector, len(data))
        if rng.random() < 0.5:
            _apply(content, ("write", 0, start + at, data[at:stop]))
        elif first_only:
            return
        at = stop


def _rename(folders: dict[int, dict[str, int]], record: Record) -> None:
    """Apply a change of names, as far as what it builds on has been kept."""
    match record:
        case ("create" | "mkdir" | "link", parent, name, node):
            folders[parent][name] = node
        case ("unlink" | "rmdir", parent, name, node):
            if folders[parent].get(name) == node:
                del folders[parent][name]
        case ("rename", parent, name, new_parent, new_name, node):
            if folders[parent].get(name) == node:
                del folders[parent][name]
            folders[new_parent][new_name] = node
