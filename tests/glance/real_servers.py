"""Starts the real Keystone and Glance on loopback, configured as small as they go, and ends them by pid."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from setup_real import DATABASES, VENV

SERVE = Path(__file__).with_name("serve_real.py")
ADMIN_PASSWORD = "admin-Zq81-secret"
READY_WITHIN_S = 60.0

GLANCE_CONFIG = """
[DEFAULT]
enabled_backends = fast:file
log_file = {folder}/glance.log
[database]
connection = sqlite:///{folder}/glance.db
[glance_store]
default_backend = fast
[fast]
filesystem_store_datadir = {folder}/data
[os_glance_staging_store]
filesystem_store_datadir = {folder}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {folder}/tasks
[paste_deploy]
flavor = {flavor}
config_file = {paste}
[oslo_policy]
enforce_scope = false
policy_file = {folder}/policy.yaml
[oslo_concurrency]
lock_path = {folder}
"""
# Checks every token anew: a revoked one is refused at once.
AUTHTOKEN_CONFIG = """
[keystone_authtoken]
auth_url = {keystone}/v3
www_authenticate_uri = {keystone}/v3
auth_type = password
username = admin
password = {password}
project_name = admin
user_domain_id = default
project_domain_id = default
token_cache_time = -1
"""
KEYSTONE_CONFIG = """
[DEFAULT]
log_file = {folder}/keystone.log
[database]
connection = sqlite:///{folder}/keystone.db
[fernet_tokens]
key_repository = {folder}/fernet
[fernet_receipts]
key_repository = {folder}/fernet
[identity]
password_hash_rounds = 4
[credential]
key_repository = {folder}/fernet
"""


@dataclass(frozen=True)
class RealGlance:
    """A running Glance; `data` is the folder of its filesystem store, a file per image."""

    url: str
    data: Path
    keystone_url: str | None = None


@contextmanager
def run_keystone(folder: Path) -> Iterator[str]:
    """Run Keystone with an admin and give its URL."""
    folder.mkdir()
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    shutil.copy(DATABASES["keystone"], folder / "keystone.db")
    (folder / "fernet").mkdir(mode=0o700)
    config = folder / "keystone.conf"
    config.write_text(KEYSTONE_CONFIG.format(folder=folder))
    owner = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
    endpoints = [f"--bootstrap-{kind}-url={url}/v3" for kind in ("admin", "internal", "public")]
    bootstrap = [f"--bootstrap-password={ADMIN_PASSWORD}", "--bootstrap-region-id=RegionOne", *endpoints]
    for arguments in (["fernet_setup", *owner], ["bootstrap", *bootstrap]):
        command = [str(VENV / "bin" / "keystone-manage"), "--config-file", str(config), *arguments]
        subprocess.run(command, check=True, timeout=120, capture_output=True)
    with _serving("keystone", port, folder, "/v3"):
        yield url


@contextmanager
def run_glance(
    folder: Path, *, keystone_url: str | None = None, port: int | None = None
) -> Iterator[RealGlance]:
    """Run Glance, with Keystone's tokens or with none."""
    for name in ("data", "staging", "tasks"):
        (folder / name).mkdir(parents=True)
    port = port or _free_port()
    shutil.copy(DATABASES["glance"], folder / "glance.db")
    paste = VENV / "etc" / "glance" / "glance-api-paste.ini"
    text = GLANCE_CONFIG.format(folder=folder, paste=paste, flavor="keystone" if keystone_url else "")
    if keystone_url:
        text += AUTHTOKEN_CONFIG.format(keystone=keystone_url, password=ADMIN_PASSWORD)
    (folder / "glance-api.conf").write_text(text)
    # Without tokens everybody has to be the administrator, or every call is refused.
    (folder / "policy.yaml").write_text("{}\n" if keystone_url else '"context_is_admin": "@"\n')
    with _serving("glance", port, folder, "/versions"):
        yield RealGlance(f"http://127.0.0.1:{port}", folder / "data", keystone_url)


@contextmanager
def _serving(name: str, port: int, folder: Path, ready_path: str) -> Iterator[None]:
    environ = os.environ | {f"OS_{name.upper()}_CONFIG_DIR": str(folder)}
    output = folder / "output"
    with output.open("wb") as sink:
        process = subprocess.Popen(
            [str(VENV / "bin" / "python"), str(SERVE), name, str(port)],
            env=environ, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
        )  # fmt: skip
        try:
            _wait_answering(process, f"http://127.0.0.1:{port}{ready_path}", output)
            yield
        finally:
            process.kill()
            process.wait()


def _wait_answering(process: subprocess.Popen[bytes], url: str, output: Path) -> None:
    give_up_at = time.monotonic() + READY_WITHIN_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError as exc:
            # Any answer of its own will do: Glance lists its versions under 300.
            exc.close()
            return
        except OSError as exc:
            if process.poll() is not None or time.monotonic() > give_up_at:
                raise RuntimeError(f"{url} does not answer: {output.read_text()[-2000:]}") from exc
            time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
