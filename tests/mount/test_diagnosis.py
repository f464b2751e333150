"""What the daemon says of itself through a real mount, whatever hangs: status, metrics, the dump of tasks."""

from __future__ import annotations

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

from real_mount import Mount, lazyimg, wait_until
from served_glance import ServedGlance


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def sample(page: str, name: str) -> float:
    """Return the value of a metric without labels."""
    return next(float(line.split()[1]) for line in page.splitlines() if line.startswith(f"{name} "))


def test_metrics_tell_what_was_fetched(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """The control socket and the TCP port show the same page, and it counts what a guest's read cost."""
    port = free_port()
    mount = make_mount(glance, metrics_listen=f"127.0.0.1:{port}")
    image = glance.add(16 << 20)
    with mount.path_of(image).open("rb") as file:
        file.read(4096)
        page = mount.client().metrics()
        assert sample(page, "lazyimg_images_at_risk") == 1
    assert 0 < sample(page, "lazyimg_fetched_bytes_total") <= mount.status()["fetched_bytes"]
    assert sample(page, "lazyimg_unforeseen_errors_total") == 0

    def over_tcp() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    wait_until(lambda: sample(over_tcp(), "lazyimg_open_images") == 0, "the release of the image")
    assert [line for line in over_tcp().splitlines() if line.startswith("# ")] == [
        line for line in page.splitlines() if line.startswith("# ")
    ]


def test_doctor_finds_all_well(make_mount: Callable[..., Mount], glance: ServedGlance) -> None:
    """Beside a running daemon, with a Glance that gives ranges, nothing fails and each line says what was seen."""
    glance.add(1 << 20)
    mount = make_mount(glance)
    flags = ["--endpoint", glance.url, "--cache-dir", mount.cache_dir, "--control", mount.control]
    done = lazyimg("doctor", mount.path, "--json", *flags)
    found = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert (done.returncode, done.stderr) == (0, "")
    for check in (
        "/dev/fuse",
        "fusermount3",
        "cache folder",
        "daemon",
        "credentials",
        "clock",
        "Glance",
        "ranges",
    ):
        assert found[check]["state"] == "ok", found[check]
    assert f"pid {mount.status()['daemon_pid']}" in found["daemon"]["seen"]


def test_doctor_names_what_fails(make_glance: Callable[..., ServedGlance], tmp_path: Path) -> None:
    """Without Glance the doctor says so in one line, with what to do, and ends with 1."""
    glance = make_glance()
    glance.stop()
    flags = ["--endpoint", glance.url, "--cache-dir", tmp_path / "cache", "--control", tmp_path / "c.sock"]
    done = lazyimg("doctor", *flags)
    assert done.returncode == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fail")]
    assert line.startswith("fail Glance: ")
    assert " → " in line
    assert done.stderr == "lazyimg: doctor: not fit: Glance; do what is said there\n"
