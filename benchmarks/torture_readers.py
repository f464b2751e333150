"""Readers of torture.py, each a process of its own: every byte they get is compared with the one that must be there.

`direct` reads as a guest with cache=none does, buffered now and then; `compare` lets qemu-img read all of an image;
`qemu-io` is a guest's disk: an overlay on the image, read and written, for as long as a guest might run.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torture_tally import Count, Gate, Tally

READ_BYTES_MAX = 1 << 20
DIRECT_ALIGN_BYTES = 4096
# Readers as fast as they can would leave the daemon nothing of two CPUs.
THINK_S_MAX = 0.004
NOT_NOW_PAUSE_S = 0.2
DUMP_LINE = re.compile(rb"^[0-9a-f]+:  ((?:[0-9a-f]{2} ){1,16})", re.MULTILINE)
PROMPT = b"qemu-io> "


def main() -> int:
    """Read until the tally says to end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("direct", "compare", "qemu-io"))
    for name in ("--image", "--expected", "--gate", "--tally", "--scratch"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--seed", required=True)
    options = parser.parse_args()
    reader = Reader(options)
    session = {"direct": reader.read_directly, "compare": reader.compare, "qemu-io": reader.run_guest_disk}
    while not reader.tally.is_ending:
        with reader.gate.opened():
            session[options.kind]()
        time.sleep(reader.chance.random() / 10)
    return 0


class Reader:
    """One process's image, and what it must read as."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.image: Path = options.image
        self.expected_path: Path = options.expected
        self.scratch: Path = options.scratch
        self.chance = random.Random(options.seed)
        self.gate = Gate(options.gate)
        self.tally = Tally(options.tally, options.name)
        self.size_bytes = options.expected.stat().st_size
        self.expected = self._expected()

    def _expected(self) -> mmap.mmap:
        """Return the image's bytes; a change of them stays in this process."""
        with self.expected_path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)

    # ── reads of our own ──

    def read_directly(self) -> None:
        """Open the image and read here and there, or on and on, for a second or two."""
        is_direct = self.chance.random() < 0.7
        with self._opened(os.O_DIRECT if is_direct else 0) as fd:
            if fd is None:
                return
            ends_s = time.monotonic() + self.chance.uniform(0.2, 2)
            buffer = mmap.mmap(-1, READ_BYTES_MAX)
            offset = 0
            while time.monotonic() < ends_s and not self.tally.is_ending:
                if self.chance.random() < 0.7 or offset >= self.size_bytes:
                    offset = self.chance.randrange(self.size_bytes // DIRECT_ALIGN_BYTES) * DIRECT_ALIGN_BYTES
                size_bytes = DIRECT_ALIGN_BYTES * self.chance.choice((1, 1, 4, 16, 32, 256))
                offset += self._read(fd, buffer, offset, size_bytes)
                time.sleep(self.chance.random() * THINK_S_MAX)

    @contextmanager
    def _opened(self, flags: int) -> Iterator[int | None]:
        """Give the image's descriptor, or None if it cannot be opened now."""
        try:
            with self.tally.timed():
                fd = os.open(self.image, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as exc:
            if exc.errno == errno.EAGAIN:
                # A lookup does not wait for Glance without end; who asks again is told again.
                self.tally.add(Count.NOT_NOW)
            else:
                self.tally.complain(Count.FAILED, f"open of {self.image}: {exc.strerror}")
            time.sleep(NOT_NOW_PAUSE_S)
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def _read(self, fd: int, buffer: mmap.mmap, offset: int, size_bytes: int) -> int:
        """Read and compare; return the bytes read."""
        size_bytes = min(size_bytes, self.size_bytes - offset)
        with memoryview(buffer)[:size_bytes] as view:
            try:
                with self.tally.timed():
                    read_bytes = os.preadv(fd, [view], offset)
            except OSError as exc:
                self.tally.complain(Count.FAILED, f"read of {size_bytes} bytes at {offset}: {exc.strerror}")
                time.sleep(NOT_NOW_PAUSE_S)
                return size_bytes
            self._check(bytes(view[:read_bytes]), offset, size_bytes)
        return size_bytes

    def _check(self, got: bytes, offset: int, size_bytes: int) -> None:
        self.tally.add(Count.READS)
        self.tally.add(Count.BYTES, len(got))
        expected = self.expected[offset : offset + size_bytes]
        if got != expected:
            self.tally.complain(Count.WRONG, _difference(got, expected, offset))

    # ── qemu's reads ──

    def compare(self) -> None:
        """Let qemu-img read all of the image, past the page cache."""
        cache = self.chance.choice(("none", "writeback"))
        command = ["qemu-img", "compare", "-f", "raw", "-F", "raw", "-T", cache]
        with self.tally.timed():
            done = subprocess.run(
                [*command, self.image, self.expected_path], capture_output=True, text=True, check=False
            )
        said = (done.stdout + done.stderr).strip()
        if done.returncode == 0:
            self.tally.add(Count.READS)
            self.tally.add(Count.BYTES, self.size_bytes)
        elif done.returncode == 1:
            self.tally.complain(Count.WRONG, f"qemu-img compare: {said}")
        elif os.strerror(errno.EAGAIN) in said:
            self.tally.add(Count.NOT_NOW)
        else:
            self.tally.complain(Count.FAILED, f"qemu-img compare: {said}")
        # One reads all in half a second; the others are to be heard too.
        time.sleep(self.chance.uniform(0.5, 3))

    def run_guest_disk(self) -> None:
        """Read and write an overlay on the image for some seconds, as one qemu that stays."""
        self.scratch.unlink(missing_ok=True)
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", self.image, self.scratch]
        with self.tally.timed():
            done = subprocess.run(create, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            if os.strerror(errno.EAGAIN) in done.stderr:
                self.tally.add(Count.NOT_NOW)
            else:
                self.tally.complain(Count.FAILED, f"qemu-img create: {done.stderr.strip()}")
            time.sleep(NOT_NOW_PAUSE_S)
            return
        # What this guest writes is in this copy alone.
        self.expected.close()
        self.expected = self._expected()
        ends_s = time.monotonic() + self.chance.uniform(3, 20)
        with QemuIo(self.scratch) as disk:
            if os.strerror(errno.EAGAIN).encode() in disk.greeting:
                self.tally.add(Count.NOT_NOW)
                return
            while time.monotonic() < ends_s and not self.tally.is_ending:
                if not self._guest_step(disk):
                    return
                time.sleep(self.chance.random() * THINK_S_MAX)

    def _guest_step(self, disk: QemuIo) -> bool:
        """Read or write one piece of the guest's disk; False if qemu has ended."""
        size_bytes = 512 * self.chance.choice((1, 2, 8, 16, 64))
        offset = self.chance.randrange((self.size_bytes - size_bytes) // 512) * 512
        is_write = self.chance.random() < 0.2
        byte = self.chance.randrange(256)
        how = f"write -P {byte}" if is_write else "read -v"
        with self.tally.timed():
            said = disk.ask(f"{how} {offset} {size_bytes}")
        if said is None or b" bytes at offset " not in said or b"failed" in said:
            words = (disk.greeting + (said or b"; it ended")).decode(errors="replace").strip()
            self.tally.complain(Count.FAILED, f"{how} of {size_bytes} bytes at {offset}: {words}")
            return False
        if is_write:
            self.expected[offset : offset + size_bytes] = bytes([byte]) * size_bytes
        else:
            got = b"".join(bytes.fromhex(match[1].decode()) for match in DUMP_LINE.finditer(said))
            self._check(got, offset, size_bytes)
        return True


class QemuIo:
    """A qemu-io that keeps its disk open, asked one thing after the other."""

    def __init__(self, disk: Path) -> None:
        self._process = subprocess.Popen(
            ["qemu-io", "-t", "none", "-f", "qcow2", disk],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        # Nothing, or why the disk cannot be opened.
        self.greeting = self._answer() or b""

    def __enter__(self) -> QemuIo:
        return self

    def __exit__(self, *_exc: object) -> None:
        with self._process as process:
            process.kill()

    def ask(self, order: str) -> bytes | None:
        """Return what it says to an order; None if it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{order}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._answer()

    def _answer(self) -> bytes | None:
        assert self._process.stdout is not None
        said = b""
        while not said.endswith(PROMPT):
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            said += part
        return said.removesuffix(PROMPT)


def _difference(got: bytes, expected: bytes, offset: int) -> str:
    """Say where two readings first differ, and what is there."""
    if len(got) != len(expected):
        return f"{len(got)} bytes read of {len(expected)} at {offset}"
    first = next(at for at, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1])
    last = next(at for at in range(len(got) - 1, -1, -1) if got[at] != expected[at])
    at = first // 8 * 8
    found, wanted = got[at : at + 8].hex(), expected[at : at + 8].hex()
    return f"[{offset + first}, {offset + last + 1}): {found} at {offset + at}, not {wanted}"


if __name__ == "__main__":
    sys.exit(main())
