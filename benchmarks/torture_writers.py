"""Writers of torture.py: upper files made, changed, renamed and read back, each against a model of what must be there.

What has been reported done must be there; a change of a name that is reported failed must have been done wholly or
not at all, and which of them is looked up and counted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from torture_tally import Count, Tally

FILE_BYTES_MAX = 300_000
FILES_MAX = 12
NAMES = 20
THINK_S_MAX = 0.02
# What a request that is sent again, after the daemon that had done it died, says of a name that is done already.
DONE_ALREADY = frozenset({errno.EEXIST, errno.ENOENT})


def main() -> int:
    """Write until the tally says to end; leave what must be there in --report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--folder", "--tally", "--report"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seed", required=True)
    options = parser.parse_args()
    tally = Tally(options.tally, options.name)
    writer = Writer(options.folder, options.name, tally, random.Random(options.seed))
    while not tally.is_ending:
        writer.step()
        time.sleep(writer.chance.random() * THINK_S_MAX)
    writer.close_held()
    options.report.write_text(json.dumps(writer.sums()))
    return 0


class Writer:
    """One folder's files that begin with `prefix`, and what each must hold."""

    def __init__(self, folder: Path, prefix: str, tally: Tally, chance: random.Random) -> None:
        self.folder = folder
        self.prefix = prefix
        self.tally = tally
        self.chance = chance
        self.files: dict[str, bytes] = {}
        # One file that stays open whatever becomes of its name: its descriptor and what it must hold.
        self.held: tuple[int, bytes] | None = None

    def step(self) -> None:
        """Do one operation and look whether it was done."""
        choices: list[Callable[[], None]] = [self.make, self.overwrite, self.append, self.truncate]
        choices += [self.rename, self.link, self.unlink, self.make_folder, self.list, self.read]
        choices += [self.use_held]
        choice = self.chance.choice(choices) if self.files else self.make
        try:
            with self.tally.timed():
                choice()
        except OSError as exc:
            words = f"{choice.__name__}: {exc.strerror} ({exc.filename})"
            self.tally.complain(Count.FAILED, words)
            # What fails as well is tried again at the next failure.
            with contextlib.suppress(OSError):
                self._learn()
        self.tally.add(Count.CHANGES)

    def sums(self) -> dict[str, str]:
        """Return the SHA-256 of each file by its name."""
        return {name: sha256(content).hexdigest() for name, content in self.files.items()}

    def close_held(self) -> None:
        """Close the file that is held."""
        if self.held is not None:
            os.close(self.held[0])
            self.held = None

    # ── content ──

    def make(self) -> None:
        """Write a file under another name, sync, and rename it into place, as Nova does."""
        name = self._any_name()
        content = self.chance.randbytes(self.chance.randrange(FILE_BYTES_MAX))
        part = self._path(f"{name}.part")
        with part.open("wb", buffering=0) as file:
            for start in range(0, len(content), 100_000):
                _write_all(file.fileno(), content[start : start + 100_000], start)
            os.fsync(file.fileno())
        self._change_name(lambda: part.rename(self._path(name)), lambda: not os.path.lexists(part))
        self.files[name] = content
        self.verify(name)

    def overwrite(self) -> None:
        """Write into the middle of a file, or past its end."""
        name = self._some_name()
        content = bytearray(self.files[name])
        start = self.chance.randrange(len(content) + 5000)
        data = self.chance.randbytes(self.chance.randrange(1, 60_000))
        content.extend(bytes(max(0, start - len(content))))
        content[start : start + len(data)] = data
        with self._path(name).open("r+b", buffering=0) as file:
            _write_all(file.fileno(), data, start)
            self.files[name] = bytes(content)
            os.fdatasync(file.fileno())
        self.verify(name)

    def append(self) -> None:
        """Add to the end of a file, with O_APPEND."""
        name = self._some_name()
        data = self.chance.randbytes(self.chance.randrange(1, 5000))
        with self._path(name).open("ab", buffering=0) as file:
            written = os.write(file.fileno(), data)
            self.files[name] += data[:written]
            os.fsync(file.fileno())
        self.verify(name)

    def truncate(self) -> None:
        """Make a file shorter or longer."""
        name = self._some_name()
        size_bytes = self.chance.randrange(FILE_BYTES_MAX)
        os.truncate(self._path(name), size_bytes)
        self.files[name] = self.files[name][:size_bytes].ljust(size_bytes, b"\0")
        self.verify(name)

    def read(self) -> None:
        """Read a file."""
        self.verify(self._some_name())

    def verify(self, name: str) -> None:
        """Compare a file with what it must hold."""
        with self._path(name).open("rb", buffering=0) as file:
            self._compare(f"{self._path(name)}", file.readall(), self.files[name])

    def use_held(self) -> None:
        """Write and read a file that stays open while its name changes."""
        if self.held is not None and self.chance.random() < 0.2:
            return self.close_held()
        if self.held is None:
            path = self._path("held")
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
            self.held = fd, b""
            is_gone = lambda: not os.path.lexists(path)  # noqa: E731  (said once, of this path)
            self._change_name(path.unlink, is_gone)
        fd, content = self.held
        data = self.chance.randbytes(self.chance.randrange(1, 20_000))
        _write_all(fd, data, len(content))
        content += data
        self.held = fd, content
        os.fsync(fd)
        self._compare("a file without a name", os.pread(fd, len(content) + 1, 0), content)
        return None

    # ── names ──

    def rename(self) -> None:
        """Give a file another name, which may be taken."""
        old, new = self._some_name(), self._any_name()
        if old == new:
            return
        self._change_name(
            lambda: self._path(old).rename(self._path(new)), lambda: not os.path.lexists(self._path(old))
        )
        self.files[new] = self.files.pop(old)
        self.verify(new)

    def link(self) -> None:
        """Copy a file by a second name, and take the first away."""
        old, new = self._some_name(), self._any_name()
        if new in self.files:
            return
        self._change_name(
            lambda: self._path(new).hardlink_to(self._path(old)), lambda: os.path.lexists(self._path(new))
        )
        self._change_name(self._path(old).unlink, lambda: not os.path.lexists(self._path(old)))
        self.files[new] = self.files.pop(old)
        self.verify(new)

    def unlink(self) -> None:
        """Remove a file."""
        name = self._some_name()
        self._change_name(self._path(name).unlink, lambda: not os.path.lexists(self._path(name)))
        del self.files[name]

    def make_folder(self) -> None:
        """Make a folder and remove it."""
        path = self._path("folder")
        self._change_name(path.mkdir, path.is_dir)
        self._change_name(path.rmdir, lambda: not os.path.lexists(path))

    def list(self) -> None:
        """Compare the folder's names with what must be there."""
        found = {name for name in os.listdir(self.folder) if name.startswith(f"{self.prefix}-")}
        wanted = {self._path(name).name for name in self.files}
        if found != wanted:
            self.tally.complain(Count.WRONG, f"listing: {sorted(found ^ wanted)} are too many or too few")

    # ── the model ──

    def _change_name(self, change: Callable[[], object], is_done: Callable[[], bool]) -> None:
        """Do a change of a name; one that is reported failed and was done is counted, and goes on."""
        try:
            change()
        except OSError as exc:
            if exc.errno not in DONE_ALREADY or not is_done():
                raise
            self.tally.add(Count.DOUBTED)
        else:
            if not is_done():
                self.tally.complain(Count.WRONG, "a change of a name was reported done and is not")

    def _compare(self, what: str, got: bytes, expected: bytes) -> None:
        if got != expected:
            same = next(
                (i for i, pair in enumerate(zip(got, expected, strict=False)) if pair[0] != pair[1]), None
            )
            words = f"{what}: {len(got)} bytes, not {len(expected)}; the first wrong one at {same}"
            self.tally.complain(Count.WRONG, words)

    def _learn(self) -> None:
        """Take what is there for right from here on, so that one failure is told once."""
        found = {}
        for path in self.folder.glob(f"{self.prefix}-*"):
            if path.is_file() and not path.name.endswith((".part", "-held")):
                found[path.name.removeprefix(f"{self.prefix}-")] = path.read_bytes()
            elif path.is_file():
                path.unlink()
            else:
                path.rmdir()
        self.files = found

    def _path(self, name: str) -> Path:
        return self.folder / f"{self.prefix}-{name}"

    def _some_name(self) -> str:
        return self.chance.choice(sorted(self.files))

    def _any_name(self) -> str:
        if len(self.files) >= FILES_MAX:
            return self._some_name()
        return str(self.chance.randrange(NAMES))


def _write_all(fd: int, data: bytes, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], start + done)


if __name__ == "__main__":
    sys.exit(main())
