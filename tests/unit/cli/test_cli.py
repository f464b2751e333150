"""The command line, run in this process against a real control server in a thread: outputs and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scripted_daemon import HOSTILE, IMAGE_ID, Outcome, ScriptedDaemon

from lazyimg import __version__, errors
from lazyimg.control import Progress
from lazyimg.errors import LazyImgError

# ── help ──


def test_version_is_the_packages(run: Callable[..., Outcome]) -> None:
    """--version prints name and version."""
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"lazyimg {__version__}\n")


COMMANDS = [
    ["mount"],
    ["umount"],
    ["restart"],
    ["status"],
    ["metrics"],
    ["doctor"],
    ["prefetch"],
    ["evict"],
    ["verify"],
    ["overlay", "create"],
    ["instance", "create"],
    ["demo"],
]


@pytest.mark.parametrize("command", [[], *COMMANDS], ids=" ".join)
def test_help_states_the_exit_codes(command: list[str], run: Callable[..., Outcome]) -> None:
    """Each command's help names every exit code of errors.py."""
    text = " ".join(run(*command, "--help").out.split())
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LazyImgError)
    ]
    assert len({kind.exit_code for kind in kinds}) == 11
    for kind in kinds:
        assert f" {kind.exit_code} " in text.partition("Exit codes:")[2]


@pytest.mark.parametrize(
    "command", [command for command in COMMANDS if command not in (["umount"], ["demo"])], ids=" ".join
)
def test_every_client_command_takes_the_socket(command: list[str], run: Callable[..., Outcome]) -> None:
    """--control is there wherever a daemon is asked, or is one."""
    assert "--control" in run(*command, "--help").out


def test_wrong_usage_is_2(run: Callable[..., Outcome]) -> None:
    """An unknown command or option is wrong usage."""
    assert run("fly").code == run("status", "--xml").code == 2


def test_import_is_light() -> None:
    """Help and errors do not wait for libraries they do not use."""
    heavy = {"trio", "httpx", "pydantic", "starlette", "hypercorn", "pyfuse3", "openstack", "oslo_utils"}
    script = f"import lazyimg.cli, sys; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ── questions to the daemon ──


def test_json_status_is_one_object_and_nothing_else(control: Path, run: Callable[..., Outcome]) -> None:
    """`status --json` prints what the daemon says as one JSON object."""
    outcome = run("status", "--json", "--control", control)
    assert (outcome.code, outcome.err) == (0, "")
    answer = json.loads(outcome.out)
    assert answer["daemon_pid"] == 77
    assert answer["images"][0]["name"] == HOSTILE


def test_status_table_shows_names_as_text(
    control: Path, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name from Glance is shown, and neither colours nor breaks the table."""
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run("status", "--control", control)
    assert outcome.code == 0
    assert f"{IMAGE_ID} " in outcome.out
    assert "a  [31mb[red]c[/red]" in outcome.out
    assert "\x1b" not in outcome.out
    assert "\u202e" not in outcome.out


def test_status_tells_first_what_is_wrong(
    control: Path, daemon: ScriptedDaemon, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs, is stuck, down or at risk comes before the table of images, whatever characters it has."""
    monkeypatch.setenv("COLUMNS", "200")
    read = {
        "image": IMAGE_ID,
        "start": 4096,
        "stop": 8192,
        "age_s": 300.0,
        "waits_for": "glance",
        "retries": 5,
    }
    image = {
        "id": "risky",
        "name": "n",
        "size_bytes": 10**9,
        "missing_bytes": 10**8,
        "at_risk": True,
        "state": "lazy",
    }
    bad = {"id": "bad", "state": "quarantined", "reason": f"not what Glance's hash says {HOSTILE}"}
    daemon.more = {
        "version": "1.2",
        "survives_kill": False,
        "requests_stuck": 3,
        "cache_is_full": True,
        "unforeseen_errors": 1,
        "disk_state": "bypass",
        "disk_error": "EIO",
        "glance": {"is_down": True, "login_error": None},
        "reads_hung": 1,
        "oldest_read_s": 300.0,
        "reads_in_flight": 1,
        "reads": [read],
        "images": [image, bad],
    }
    out = run("status", "--control", control).out
    lines = out.splitlines()
    for told in (
        "this kernel does not send again",
        "3 requests are stuck in the kernel",
        "the cache is full",
        "1 requests failed by a fault of lazyimg's own",
        "the cache disk is in state bypass: EIO",
        "Glance is down: no endpoint answers",
        "image bad is quarantined: not what Glance's hash says",
        "1 images at risk",
        "1 reads hang, the oldest for 5 min",
    ):
        assert any(line.startswith(told) for line in lines), told
    assert out.index("the oldest 1 of 1 reads") < out.index("│ risky") < out.index("│ bad")
    assert "\x1b" not in out


def test_metrics_are_printed_as_they_are(control: Path, run: Callable[..., Outcome]) -> None:
    """`lazyimg metrics` prints the page that Prometheus reads."""
    outcome = run("metrics", "--control", control)
    assert outcome.code == 0
    assert 'lazyimg_images{state="partial"} 1.0\n' in outcome.out


def test_no_daemon_is_3(tmp_path: Path, run: Callable[..., Outcome]) -> None:
    """Without a daemon: one line that names the socket and the next step."""
    outcome = run("status", "--json", "--control", tmp_path / "none")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.startswith(f"lazyimg: control socket {tmp_path / 'none'}: no daemon answers")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    "kind", [errors.ConfigError, errors.GlanceUnavailable, errors.ImageNotFound, errors.ImageForbidden,
             errors.InUse, errors.CredentialsRefused, errors.LazyImgError]
)  # fmt: skip
@pytest.mark.parametrize("command", [["status"], ["evict", "x"], ["prefetch", "x"], ["verify", "x"],
                                     ["overlay", "create", "x"]], ids=" ".join)  # fmt: skip
def test_daemons_errors_are_one_line_and_their_exit_code(
    kind: type[LazyImgError],
    command: list[str],
    control: Path,
    daemon: ScriptedDaemon,
    run: Callable[..., Outcome],
    tmp_path: Path,
) -> None:
    """What the daemon refuses ends the command as errors.py says, whatever characters the message has."""
    daemon.fails = kind(f"image {HOSTILE}: no")
    dest = [str(tmp_path / "disk")] if command[0] == "overlay" else []
    outcome = run(*command, *dest, "--control", control)
    assert outcome.code == kind.exit_code
    last = outcome.err.splitlines()[-1]
    assert last == "lazyimg: image a  [31mb[red]c[/red]  : no"


def test_prefetch_draws_on_standard_error(control: Path, run: Callable[..., Outcome]) -> None:
    """Standard output stays empty: the bar is for people."""
    outcome = run("prefetch", "debian[red]", "--control", control)
    assert (outcome.code, outcome.out) == (0, "")
    assert "prefetch debian[red]" in outcome.err


def test_evict_says_what_was_freed(control: Path, run: Callable[..., Outcome]) -> None:
    """The bytes freed are printed."""
    assert run("evict", "debian", "--control", control).out == "debian: 4096 bytes freed\n"


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        (Progress(9, 9, 0, "match"), 0, "9 of 9 bytes checked, matches Glance's hash"),
        (Progress(5, 9, 0, "unknown"), 0, "5 of 9 bytes checked, undamaged; source hash not known"),
        (Progress(9, 9, 2, "unknown"), 1, "lazyimg: image debian: 2 chunks are damaged"),
        (Progress(9, 9, 0, "mismatch"), 1, "lazyimg: image debian: it does not match Glance's hash"),
        (None, 1, "lazyimg: image debian: the daemon gave no verdict"),
    ],
)
def test_verify_ends_with_its_verdict(
    last: Progress | None,
    code: int,
    said: str,
    control: Path,
    daemon: ScriptedDaemon,
    run: Callable[..., Outcome],
) -> None:
    """Damage or another hash is exit code 1 and one line."""
    daemon.steps = [] if last is None else [Progress(0, 9), last]
    outcome = run("verify", "debian", "--control", control)
    assert outcome.code == code
    assert said in (outcome.out if code == 0 else outcome.err.splitlines()[-1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_command_and_work(
    number: signal.Signals, code: int, control: Path, daemon: ScriptedDaemon
) -> None:
    """Ctrl-C and SIGTERM end a prefetch here and in the daemon, without a traceback."""
    daemon.hangs = True
    command = [
        sys.executable,
        "-c",
        "from lazyimg.cli import main; main()",
        "prefetch",
        "x",
        "--control",
        str(control),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert daemon.is_working.wait(20)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in err
    assert daemon.has_stopped.wait(10)


# ── where the socket is ──


def test_socket_comes_from_flag_environment_or_file(
    control: Path, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The flag wins over LAZYIMG_CONTROL, that over the file of LAZYIMG_CONFIG."""
    file = tmp_path / "lazyimg.toml"
    file.write_text(f'control = "{control}"\n')
    monkeypatch.setenv("LAZYIMG_CONFIG", str(file))
    assert run("status", "--json").code == 0
    monkeypatch.setenv("LAZYIMG_CONTROL", "/nowhere/sock")
    assert "/nowhere/sock" in run("status", "--json").err
    assert run("status", "--json", "--control", control).code == 0


def test_broken_config_does_not_matter_with_the_flag(
    control: Path, run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The config may hold what a client may not read: with --control it is not opened."""
    (tmp_path / "bad.toml").write_text("no = ")
    monkeypatch.setenv("LAZYIMG_CONFIG", str(tmp_path / "bad.toml"))
    assert run("status", "--json").code == 2
    assert run("status", "--json", "--control", control).code == 0


# ── the companion ──


def test_overlay_create_makes_a_disk(
    control: Path, run: Callable[..., Outcome], tmp_path: Path, require: Callable[..., None]
) -> None:
    """IMAGE and DEST are enough; sizes are words; DEST that exists is 7 and a size too small too."""
    require("qemu-img")
    disk = tmp_path / "disk"
    outcome = run("overlay", "create", "debian", disk, "--size", "1G", "--control", control)
    assert (outcome.code, outcome.err) == (0, "")
    assert f"{disk}: 1073741824 bytes on " in outcome.out
    shown = subprocess.run(["qemu-img", "info", "--output=json", disk], capture_output=True, check=True)
    assert json.loads(shown.stdout)["virtual-size"] == 1 << 30
    assert run("overlay", "create", "debian", disk, "--control", control).code == 7
    assert (
        run("overlay", "create", "debian", tmp_path / "small", "--size", "1K", "--control", control).code == 7
    )


@pytest.mark.parametrize("size", ["0", "-1", "many", "20X", ""])
def test_impossible_size_is_2(size: str, run: Callable[..., Outcome], control: Path, tmp_path: Path) -> None:
    """A size that is none names what would do, and nothing is made."""
    outcome = run("overlay", "create", "x", tmp_path / "disk", f"--size={size}", "--control", control)
    assert outcome.code == 2
    assert outcome.err == f"lazyimg: size {size!r}: give bytes or a number with K, M, G or T, such as 20G\n"
    assert not (tmp_path / "disk").exists()


def test_instance_create_makes_all_files(
    control: Path, run: Callable[..., Outcome], tmp_path: Path, require: Callable[..., None]
) -> None:
    """Disk, kernel, ramdisk and config drive, each named on standard output."""
    require("qemu-img")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "meta_data.json").write_text("{}")
    flags = ["--image=a", "--kernel-id=b", "--ramdisk-id=c", "--config-drive", tmp_path / "tree"]
    outcome = run("instance", "create", tmp_path / "vm", *flags, "--control", control)
    assert (outcome.code, outcome.err) == (0, "")
    names = ["disk", "disk.config", "kernel", "ramdisk"]
    assert sorted(os.listdir(tmp_path / "vm")) == names
    for name in names:
        assert str(tmp_path / "vm" / name) in outcome.out
