"""The command line, run in this process against a real control server in a thread: outputs and exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from lazyimg import __version__, cli, errors
from lazyimg.config import Config
from lazyimg.control import ImageFacts, Progress, serve_control
from lazyimg.core.identity import base_name
from lazyimg.errors import LazyImgError

IMAGE_ID = "11111111-2222-3333-4444-555555555555"
CONTENT = b"raw image " * 1000
# A name that would draw, colour and break lines if it were let.
HOSTILE = "a\n\x1b[31mb[red]c[/red]\r\u202e"


class ScriptedDaemon:
    """Has one image below a folder that stands for the mount."""

    def __init__(self, mount: Path) -> None:
        self.mount = mount
        self.fails: Exception | None = None
        self.steps: list[Progress] = [Progress(50, 100), Progress(100, 100)]
        self.hangs = False
        self.is_working = threading.Event()
        self.has_stopped = threading.Event()

    def status(self) -> dict[str, object]:
        if self.fails:
            raise self.fails
        image = {
            "id": IMAGE_ID,
            "name": HOSTILE,
            "size_bytes": len(CONTENT),
            "present_bytes": 4096,
            "fetched_bytes": 5000,
            "requests": 3,
            "source": "ranges",
            "open_handles": 1,
            "state": "partial",
        }
        return {"daemon_pid": 77, "images": [image]}

    async def image_facts(self, image: str) -> ImageFacts:
        if self.fails:
            raise self.fails
        return ImageFacts(
            id=IMAGE_ID,
            name=HOSTILE,
            base_name=base_name(IMAGE_ID),
            disk_format="raw",
            container_format="bare",
            size_bytes=len(CONTENT),
            presented_size_bytes=len(CONTENT),
            presented_format="raw",
            view="stored",
            mountpoint=str(self.mount),
            os_hash_algo="sha512",
            os_hash_value=hashlib.sha512(CONTENT).hexdigest(),
        )

    async def evict(self, image: str) -> int:
        if self.fails:
            raise self.fails
        return 4096

    async def prefetch(self, image: str) -> AsyncIterator[Progress]:
        for step in self.steps:
            yield step
        if self.fails:
            raise self.fails
        if self.hangs:
            self.is_working.set()
            try:
                await trio.sleep_forever()
            finally:
                self.has_stopped.set()

    def verify(self, image: str) -> AsyncIterator[Progress]:
        return self.prefetch(image)


@pytest.fixture(autouse=True)
def _clean_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No configuration from outside, and the signal handlers as they were."""
    for name in os.environ:
        if name.startswith("LAZYIMG_"):
            monkeypatch.delenv(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def daemon(tmp_path: Path) -> ScriptedDaemon:
    mount = tmp_path / "instances" / "_base"
    mount.mkdir(parents=True)
    (mount / base_name(IMAGE_ID)).write_bytes(CONTENT)
    return ScriptedDaemon(mount)


@pytest.fixture
def control(daemon: ScriptedDaemon, tmp_path: Path) -> Iterator[Path]:
    """The socket of a server that answers for `daemon`."""
    path = tmp_path / "control.sock"
    is_ready = threading.Event()
    ended: list[Callable[[], None]] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            token = trio.lowlevel.current_trio_token()
            ended.append(lambda: token.run_sync_soon(nursery.cancel_scope.cancel))
            await nursery.start(partial(serve_control, daemon, path, mode=0o600, group=None))
            is_ready.set()

    server = threading.Thread(target=trio.run, args=(main,))
    server.start()
    assert is_ready.wait(10)
    yield path
    ended[0]()
    server.join(10)
    assert not server.is_alive()


class Outcome:
    """What a run printed, and its exit code."""

    def __init__(self, code: object, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lazyimg", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code or 0, *capsys.readouterr())

    return run


# ── help ──


def test_version_is_the_packages(run: Callable[..., Outcome]) -> None:
    """--version prints name and version."""
    outcome = run("--version")
    assert (outcome.code, outcome.out) == (0, f"lazyimg {__version__}\n")


COMMANDS = [
    ["mount"],
    ["umount"],
    ["status"],
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
    assert len({kind.exit_code for kind in kinds}) == 10
    for kind in kinds:
        assert f" {kind.exit_code} " in text.partition("Exit codes:")[2]


@pytest.mark.parametrize("command", [["status"], ["prefetch"], ["evict"], ["verify"], ["overlay", "create"],
                                     ["instance", "create"], ["mount"]], ids=" ".join)  # fmt: skip
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


# ── what runs the daemon and the demo ──


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Callable[..., Any]], None]:
    """Put a module with one function in the place of one whose work needs a mount."""

    def stand_in(module: str, name: str, function: Callable[..., Any]) -> None:
        stub = ModuleType(module)
        setattr(stub, name, function)
        monkeypatch.setitem(sys.modules, module, stub)

    return stand_in


def test_mount_gets_config_and_gives_its_exit_code(
    run: Callable[..., Outcome],
    stand_in: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Flags win over the file; endpoints may be repeated; what the daemon returns is the exit code."""
    got: list[tuple[Config, Path]] = []

    def run_mount(config: Config, mountpoint: Path) -> int:
        got.append((config, mountpoint))
        return 6

    stand_in("lazyimg.daemon.holder", "run_mount", run_mount)
    monkeypatch.setattr(cli, "set_up_logging", lambda config: None)
    file = tmp_path / "f.toml"
    file.write_text('read_timeout = 7\ncache_dir = "/from/file"\ncloud = "c"\n')
    flags = ["--endpoint", "http://a", "--endpoint", "http://b", "--cache-dir", tmp_path / "d"]
    assert run("mount", tmp_path / "mnt", "--config", file, *flags, "--control", tmp_path / "s").code == 6
    config, mountpoint = got[0]
    assert mountpoint == tmp_path / "mnt"
    assert (config.endpoint, config.cloud) == (("http://a", "http://b"), None)
    assert (config.cache_dir, config.control, config.read_timeout) == (tmp_path / "d", tmp_path / "s", 7)


def test_mount_refuses_a_bad_config_before_anything(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """An unknown key, two places for Glance or a missing file is 2 and one line."""
    file = tmp_path / "f.toml"
    file.write_text("colour = 1\n")
    outcome = run("mount", tmp_path / "mnt", "--config", file)
    assert outcome.code == 2
    assert outcome.err.startswith(f"lazyimg: config key 'colour' ({file}): unknown")
    assert run("mount", tmp_path / "mnt", "--endpoint", "http://a", "--cloud", "b").code == 2
    assert run("mount", tmp_path / "mnt", "--config", tmp_path / "none").code == 2


def test_umount_passes_lazy_on(run: Callable[..., Outcome], stand_in: Callable[..., None]) -> None:
    """--lazy detaches, without it a busy mount stays."""
    got = []
    stand_in("lazyimg.daemon.mountpoint", "umount", lambda path, *, lazy: got.append((path, lazy)))
    assert run("umount", "/no").code == run("umount", "--lazy", "/no").code == 0
    assert got == [(Path("/no"), False), (Path("/no"), True)]


def test_demo_gives_its_exit_code(run: Callable[..., Outcome], stand_in: Callable[..., None]) -> None:
    """What the demo returns is the exit code."""
    stand_in("lazyimg.demo.run", "run_demo", lambda *, keep: 40 + keep)
    assert [run("demo").code, run("demo", "--keep").code] == [40, 41]


@pytest.mark.parametrize(("is_journal", "pattern"), [(True, "W m: x\n"), (False, "20")])
def test_log_lines_have_a_time_unless_the_journal_adds_it(is_journal: bool, pattern: str) -> None:
    """Under systemd the journal has the time already."""
    script = (
        "import logging; from lazyimg import cli; from lazyimg.config import Config\n"
        "cli.set_up_logging(Config(log_level='WARNING')); log = logging.getLogger('m')\n"
        "log.info('no'); log.warning('x')"
    )
    environment = {**os.environ, "JOURNAL_STREAM": "8:1"}
    if not is_journal:
        del environment["JOURNAL_STREAM"]
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(pattern.replace("W ", "WARNING "))
