"""The layers of DESIGN.md, read from the import statements: imports point down, one owner per library."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import lazyimg

ROOT = Path(__file__).parents[2]
# The installed package where CI tests the wheel, else the tree.
PACKAGE = Path(lazyimg.__file__).parent

# Each part and the parts it may import.  `demo` is a program of its own: it uses lazyimg's command line;
# only its embedded Glance reads records as the client does.
MAY_IMPORT: dict[str, set[str]] = {
    "cli": {"daemon", "overlay", "doctor", "control", "demo", "core", "metrics", "logs", "config", "errors"},
    "daemon": {"image", "glance", "store", "control", "core", "metrics", "logs", "config", "errors"},
    "overlay": {"control", "core", "metrics", "config", "errors"},
    "doctor": {"glance", "control", "core", "config", "errors"},
    "image": {"glance", "store", "control", "core", "metrics", "config", "errors"},
    "glance": {"core", "metrics", "config", "errors"},
    "store": {"core", "metrics", "config", "errors"},
    "control": {"core", "metrics", "config", "errors"},
    "demo": {"glance", "core", "config", "errors"},
    "core": {"errors"},
    "logs": set(),
    "metrics": set(),
    "config": {"errors"},
    "errors": set(),
}

# Each library and the parts or modules that may import it; a part stands for everything below it.
OWNERS: dict[str, set[str]] = {
    "pyfuse3": {"daemon"},
    "trio": {"daemon", "image", "glance", "store", "control", "doctor", "demo", "cli"},
    "httpx": {"glance.connections", "control", "demo"},
    "httpcore": {"glance.connections"},
    "diskcache": {"store"},
    "xxhash": {"store"},
    "isal": {"core.qcow2"},
    "openstack": {"glance.auth"},
    "keystoneauth1": {"glance.auth"},
    "oslo_utils": {"core.header"},
    # zstd: in the standard library from 3.14 on, a backport before.
    "backports": {"core.qcow2"},
    "compression": {"core.qcow2"},
    "pydantic": {"config"},
    "typer": {"cli"},
    "rich": {"cli", "demo"},
    "starlette": {"control", "demo"},
    "hypercorn": {"control", "demo"},
    "prometheus_client": {"metrics"},
    "pycdlib": {"overlay"},
    "fasteners": {"overlay"},
    # The daemon runs fusermount3 and itself, nothing that looks under the mount (I11).
    "subprocess": {"overlay", "doctor", "demo", "daemon.mountpoint"},
}

# What a decision may not reach for: I/O, the clock and chance belong to the callers of core.
NOT_IN_CORE = {
    "asyncio", "datetime", "httpx", "io", "os", "pathlib", "random", "secrets", "shutil", "socket",
    "subprocess", "tempfile", "threading", "time", "trio",
}  # fmt: skip


def _modules() -> dict[str, Path]:
    """Return every module by its dotted name below `lazyimg`; the package itself is "lazyimg"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "lazyimg"] = path
    return found


MODULES = _modules()


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


def _imports(module: str) -> Iterator[str]:
    """Yield the full dotted name of everything imported anywhere in a module, inside functions too."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import would hide its layer from this reader and from people.
            assert node.level == 0, f"line {node.lineno}: import by full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _is_within(module: str, owners: set[str]) -> bool:
    return any(module == owner or module.startswith(f"{owner}.") for owner in owners)


def test_every_part_of_the_package_has_a_place() -> None:
    """Each module belongs to a part the layer table knows."""
    assert {name.partition(".")[0] for name in MODULES} <= {*MAY_IMPORT, "lazyimg"}


def test_layer_table_has_no_cycle() -> None:
    """The table itself points down only: no part can reach itself through the parts it may import."""
    left = {part: set(below) for part, below in MAY_IMPORT.items()}
    while lowest := {part for part, below in left.items() if not below}:
        left = {part: below - lowest for part, below in left.items() if part not in lowest}
    assert not left


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    """A module imports only from its own part and the parts below it."""
    part = module.partition(".")[0]
    ours = {name.split(".")[1] for name in _imports(module) if name.startswith("lazyimg.")}
    # `from lazyimg import __version__` is no layer.
    assert ours - {"__version__"} <= MAY_IMPORT.get(part, set()) | {part}


@pytest.mark.parametrize("module", MODULES)
def test_each_library_has_one_owner(module: str) -> None:
    """A library is imported only where its owner is; a library nobody owns is not imported at all."""
    libraries = {name.partition(".")[0] for name in _imports(module)} - {"lazyimg", "__future__"}
    unowned = libraries - sys.stdlib_module_names - set(OWNERS)
    assert not unowned, "give each an owner here and its reason in DESIGN.md"
    stolen = {name for name in libraries & set(OWNERS) if not _is_within(module, OWNERS[name])}
    assert not stolen


def test_every_dependency_has_an_owner_and_a_use() -> None:
    """What pyproject.toml installs is what the owners import, no more."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {re.split(r"[\[<>=~! ]", line)[0].lower() for line in project["dependencies"]}
    import_names = {
        "openstacksdk": "openstack",
        "oslo.utils": "oslo_utils",
        "prometheus-client": "prometheus_client",
        "backports.zstd": "backports",
    }
    wanted = {import_names.get(name, name) for name in installed}
    assert wanted <= set(OWNERS)
    used = {name.partition(".")[0] for module in MODULES for name in _imports(module)}
    assert wanted <= used


@pytest.mark.parametrize("module", [name for name in MODULES if _is_within(name, {"core"})])
def test_core_only_decides(module: str) -> None:
    """Core reaches for no file, clock, thread, network or chance."""
    assert not {name.partition(".")[0] for name in _imports(module)} & NOT_IN_CORE
    calls = {
        node.func.id
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "eval", "exec"}


@pytest.mark.parametrize("module", [name for name in MODULES if _is_within(name, {"daemon"})])
def test_daemon_runs_nothing_that_looks_under_the_mount(module: str) -> None:
    """Holder and daemon run fusermount3 and themselves only, and never change their working folder [I11]."""
    processes = re.compile(
        r"fork|exec[lv]\w*|posix_spawnp?|spawn\w+|system|popen|Popen|run_process|f?chdir|chroot"
    )
    calls = {
        node.func.attr
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in {"os", "subprocess", "trio"}
    }
    allowed = {"daemon.handshake": {"fork"}, "daemon.spawn": {"posix_spawn"}}
    assert {name for name in calls if processes.fullmatch(name)} == allowed.get(module, set())


def test_daemon_starts_without_what_a_read_does_not_need() -> None:
    """Wiring the daemon imports neither openstacksdk nor the web server: a restart must be quick."""
    program = "import json, sys; import lazyimg.daemon.service; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60
    )
    loaded = set(json.loads(output.stdout))
    heavy = {"openstack", "keystoneauth1", "starlette", "hypercorn", "prometheus_client", "typer", "rich"}
    assert not loaded & heavy
