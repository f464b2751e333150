"""A hypervisor for the tests: an instances folder that belongs to Nova's user, and Nova on it.

Nova runs as uid 65534.  What it does as root it does by its own way, `sudo nova-rootwrap … privsep-helper`, with
its real rootwrap and helper; only sudo itself is a stand-in, which asks `RootCommands` here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from real_mount import wait_until
from setup_nova import PYTHON, VENV

HERE = Path(__file__).parent
NOVA_UID = NOVA_GID = 65534
# A spawn reads through the mount, on a machine that may be doing much else.
ANSWER_TIMEOUT_S = 150
END_TIMEOUT_S = 30
SECURE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# Nova's own defaults but for where things are: force_raw_images, images_type, the cache manager and its ages.
CONFIG = """
[DEFAULT]
state_path = {folder}/state
instances_path = {folder}/instances
rootwrap_config = {folder}/rootwrap.conf
host = hypervisor
my_ip = 127.0.0.1
transport_url = fake://
debug = true
{more}
[glance]
api_servers = {glance_url}
[libvirt]
virt_type = qemu
snapshots_directory = {folder}/state/snapshots
[service_user]
send_service_user_token = false

"""
ROOTWRAP_CONFIG = """
[DEFAULT]
filters_path = {folder}/rootwrap.d
exec_dirs = {venv}/bin,/usr/sbin,/usr/bin,/sbin,/bin
"""
# The line that Nova ships (etc/nova/rootwrap.d/compute.filters), for a configuration that is not in /etc.
ROOTWRAP_FILTER = """
[Filters]
privsep-rootwrap-sys_admin: RegExpFilter, privsep-helper, root, privsep-helper, --config-file, {folder}/nova.conf, \
--privsep_context, nova.privsep.sys_admin_pctxt, --privsep_sock_path, {folder}/tmp/.*
"""


class NovaFailed(Exception):
    """Nova raised; `kind` is its exception's name."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


class RootCommands:
    """Runs as root what the stand-in for sudo is asked for, each with sudo's clean environment."""

    def __init__(self, path: Path, log_path: Path) -> None:
        self.commands: list[list[str]] = []
        self._log_path = log_path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        os.chown(path, NOVA_UID, NOVA_GID)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more commands."""
        # close() alone does not wake accept().
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                data = connection.makefile("rb").read()
                connection.sendall(str(self._run(json.loads(data))).encode())

    def _run(self, command: list[str]) -> int:
        self.commands.append(command)
        environ = {"PATH": f"{VENV}/bin:{SECURE_PATH}", "PYTHONWARNINGS": "ignore"}
        # The tests' mark, by which a process that outlives them is found.
        environ |= {name: value for name, value in os.environ.items() if name.startswith("PYTEST_SESSION")}
        with self._log_path.open("ab") as log:
            return subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ, cwd="/", check=False
            ).returncode


class Nova:
    """The driver process: `nova.spawn(uuid=…)` calls its method of that name; NovaFailed is what Nova raised."""

    def __init__(self, folder: Path) -> None:
        self.log_path = folder / "nova.log"
        environ = {
            "PATH": f"{folder}/bin:{SECURE_PATH}",
            "HOME": f"{folder}/state",
            "TMPDIR": f"{folder}/tmp",
            # The binding of a real libvirt, where there is one.
            "PYTHONPATH": f"{folder}/python",
            "PYTHONWARNINGS": "ignore",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environ |= {name: value for name, value in os.environ.items() if name.startswith("PYTEST_SESSION")}
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [VENV / "bin" / "python", folder / "bin" / "driver.py", "--config-file", folder / "nova.conf"],
                env=environ, cwd="/", user=NOVA_UID, group=NOVA_GID, extra_groups=[],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def __getattr__(self, name: str) -> Any:
        return lambda **details: self._call(name, details)

    def end(self) -> None:
        """End it; its helper ends with it."""
        with self._process as process:
            process.stdin.close()  # type: ignore[union-attr]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT_S)
            process.kill()

    def _call(self, name: str, details: dict[str, Any]) -> Any:
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        pipe_in.write(json.dumps({"name": name, "details": details}) + "\n")
        pipe_in.flush()
        # A call that hangs ends with its process, and the read with an empty line.
        watchdog = threading.Timer(ANSWER_TIMEOUT_S, self._process.send_signal, [signal.SIGKILL])
        watchdog.start()
        try:
            line = pipe_out.readline()
        finally:
            watchdog.cancel()
        assert line, f"Nova ended or hung in {name}:\n{self.log_path.read_text()[-4000:]}"
        answer = json.loads(line)
        if "error" in answer:
            raise NovaFailed(answer["error"], answer["message"])
        return answer["result"]


class NovaHost:
    """The folder of one hypervisor, and Nova once it is started."""

    def __init__(self, folder: Path, glance_url: str, more_config: str = "") -> None:
        self.folder = folder
        self.instances = folder / "instances"
        self.base = self.instances / "_base"
        self._nova: Nova | None = None
        for name in ("state", "instances", "instances/_base", "tmp"):
            (folder / name).mkdir()
            os.chown(folder / name, NOVA_UID, NOVA_GID)
        for name in ("bin", "rootwrap.d"):
            (folder / name).mkdir()
        where = {"folder": folder, "venv": VENV}
        more = more_config.replace("{folder}", str(folder))
        config = CONFIG.format(**where, glance_url=glance_url, more=more)
        (folder / "nova.conf").write_text(config)
        (folder / "rootwrap.conf").write_text(ROOTWRAP_CONFIG.format(**where))
        (folder / "rootwrap.d" / "compute.filters").write_text(ROOTWRAP_FILTER.format(**where))
        # Copies, for Nova's user may not be able to come to where the tests are.
        for name in ("driver.py", "sudo.py"):
            shutil.copyfile(HERE / name, folder / "bin" / name)
        sudo = folder / "bin" / "sudo"
        sudo.write_text(f'#!/bin/sh\nexec {VENV}/bin/python -IS {folder}/bin/sudo.py {folder}/root "$@"\n')
        sudo.chmod(0o755)
        self.root = RootCommands(folder / "root", folder / "root.log")

    def provide_libvirt_binding(self) -> None:
        """Let Nova, in its virtual environment, import the system's binding of libvirt and nothing else of it."""
        (self.folder / "python").mkdir()
        find = "import libvirt, libvirtmod; print(libvirt.__file__, libvirtmod.__file__)"
        found = subprocess.run([PYTHON, "-c", find], check=True, capture_output=True, text=True).stdout
        for path in map(Path, found.split()):
            (self.folder / "python" / path.name).symlink_to(path)

    @property
    def nova(self) -> Nova:
        """Nova, started when it is first asked for."""
        if self._nova is None:
            self._nova = Nova(self.folder)
        return self._nova

    def end(self) -> None:
        """End Nova, its helper and the stand-in for sudo."""
        if self._nova is not None:
            self._nova.end()
            self._nova = None
        wait_until(lambda: not _helpers_of(self.folder), "the end of Nova's privileged helper")
        self.root.stop()

    def spawn(self, image_id: str, **details: Any) -> Path:
        """Start an instance and return its folder, whose name is its uuid."""
        name = str(uuid.uuid4())
        self.nova.spawn(uuid=name, image_id=image_id, **details)
        return self.instances / name


@contextlib.contextmanager
def nova_host(glance_url: str, more_config: str = "") -> Iterator[NovaHost]:
    """Give a hypervisor; what is mounted there must be unmounted before the block ends."""
    # Not pytest's own folder, which Nova's user cannot reach.
    folder = Path(tempfile.mkdtemp(prefix="lazyimg-nova-", dir="/tmp"))
    folder.chmod(0o755)
    host = NovaHost(folder, glance_url, more_config)
    try:
        yield host
    finally:
        host.end()
        assert str(folder) not in Path("/proc/self/mounts").read_text(), f"still mounted below {folder}"
        shutil.rmtree(folder)


def _helpers_of(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes()
            if b"privsep-helper" in command and str(folder).encode() in command:
                found.append(int(process.name))
    return found
