"""The documents say what the code does: commands, exit codes, configuration keys and quoted invariants."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

import lazyimg
from lazyimg import errors
from lazyimg.config import Config
from lazyimg.daemon.inflight import ReadInFlight

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
DESIGN = (ROOT / "DESIGN.md").read_text()
# Keys that exist so that what comes has room; any value but false is refused.
NOT_BUILT = {"graduate"}
INVARIANTS = re.findall(r"^\| \*\*(I\d+)\*\*", DESIGN, re.MULTILINE)


@cache
def _help(*command: str) -> str:
    """Return the help text of a `lazyimg` command, wide enough that nothing is cut."""
    program = Path(sys.executable).with_name("lazyimg")
    environ = os.environ | {"COLUMNS": "240", "NO_COLOR": "1", "TERM": "dumb"}
    result = subprocess.run(
        [program, *command, "--help"], capture_output=True, text=True, timeout=60, check=True, env=environ
    )
    return result.stdout


def _commands() -> list[tuple[str, str]]:
    """Return (document, command line) of each `$ …` line and each quoted `lazyimg …` of the documents."""
    found = set()
    for path in DOCUMENTS:
        text = path.read_text()
        for line in re.findall(
            r"^\$ (.*?)(?:\s{2,}#.*)?$|`((?:lazyimg|make) [a-z][^`]*)`", text, re.MULTILINE
        ):
            found.add((path.name, line[0] or line[1]))
    return sorted(found)


def _subcommand(words: list[str]) -> tuple[str, ...]:
    """Return the leading words that name a command: one, or two where the first is a group."""
    is_group = len(words) > 1 and re.search(r"COMMAND \[ARGS\]", _help(words[0])) is not None
    return tuple(words[: 2 if is_group else 1])


def test_readme_shows_the_commands_people_need() -> None:
    """The first screen has the demo, the mount's life, a disk, and the test command."""
    shown = {" ".join(line.split()[:3]) for document, line in _commands() if document == "README.md"}
    for wanted in ("make demo", "make test", "lazyimg mount", "lazyimg status", "lazyimg umount"):
        assert any(line.startswith(wanted) for line in shown), wanted
    assert "lazyimg overlay create" in shown


@pytest.mark.parametrize(("document", "line"), _commands())
def test_documented_commands_exist(document: str, line: str) -> None:
    """Each command, with each option shown, is one that the program or the Makefile has."""
    program, *words = line.split()
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[0] in targets, document
        return
    assert program == "lazyimg"
    command = _subcommand(words)
    text = _help(*command)
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{document}: {option}"


def _own_exit_codes() -> dict[str, int]:
    """Return class name and exit code of each error that states a code of its own."""
    return {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.LazyImgError) and "exit_code" in vars(kind)
    }


def test_documented_exit_codes_are_those_of_the_errors() -> None:
    """docs/operations.md has one row for each exit code, with the error that has it."""
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert {name: int(code) for code, name in rows} == _own_exit_codes()
    assert len(rows) == len(_own_exit_codes())


def test_every_status_field_is_documented() -> None:
    """docs/operations.md explains each key that the daemon puts into its status, and no other."""
    package = Path(lazyimg.__file__).parent
    answers = (package / "daemon" / "answers.py").read_text()
    keys = {field.name for field in dataclasses.fields(ReadInFlight)}
    keys |= set(re.findall(r'^\s+"(\w+)": ', answers, re.MULTILINE)) | set(
        re.findall(r'\{"(\w+)": ', answers)
    )
    table = (ROOT / "docs/operations.md").read_text().partition("| Field | Meaning |")[2].partition("\n\n")[0]
    documented = {
        field
        for row in table.splitlines()
        if row.startswith("| `")
        for field in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert documented == keys


def test_help_names_every_exit_code() -> None:
    """`lazyimg --help` ends with the codes of the errors, and those of success and of signals."""
    named = {int(code) for code in re.findall(r"\b(\d+)\s+[a-z]", _help().partition("Exit codes:")[2])}
    assert named == {0, 130, 143} | set(_own_exit_codes().values())


def test_every_configuration_key_is_documented_with_its_default() -> None:
    """docs/configuration.md has one row for each key, and its default is the code's."""
    text = (ROOT / "docs/configuration.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert set(rows) == set(Config.model_fields)
    default = Config()
    for key, cell in rows.items():
        if cell == "none":
            assert getattr(default, key) is None, key
        else:
            written = Config(**{key: tomllib.loads(f"value = {cell.strip('`')}")["value"]})
            assert getattr(written, key) == getattr(default, key), key


def test_every_configuration_key_is_read_by_the_code() -> None:
    """A key that nothing reads would be a limit that bounds nothing [I5]."""
    package = Path(lazyimg.__file__).parent
    read = {
        node.attr
        for path in package.rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert set(Config.model_fields) - NOT_BUILT <= read


def test_design_gives_the_reason_of_each_library() -> None:
    """Every dependency of pyproject.toml has a row in DESIGN.md's table of libraries, and no other has."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    table = DESIGN.partition("| Library | Owner | Why |")[2].partition("\n\n")[0]
    rows = {name for row in table.splitlines()[2:] for name in row.split("|")[1].strip().split(", ")}
    assert rows == {re.split(r"[\[<>=~!; ]", line)[0] for line in dependencies}


def _quoted_invariants() -> set[str]:
    """Return each invariant that the docstring of a test quotes, as `[I3]` or as "Invariant 3: …"."""
    quoted: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                docstring = ast.get_docstring(node) or ""
                quoted.update(f"I{n}" for n in re.findall(r"(?:\[I|\bInvariant )(\d+)\b", docstring))
    return quoted


def test_design_states_its_invariants_in_order() -> None:
    """The table of DESIGN.md is read by these tests, so it must have the form they read."""
    assert len(INVARIANTS) >= 8
    assert sorted(set(INVARIANTS), key=lambda name: int(name[1:])) == INVARIANTS


@pytest.mark.parametrize("invariant", INVARIANTS)
def test_each_invariant_is_quoted_by_a_test(invariant: str) -> None:
    """What DESIGN.md promises, a test holds and quotes."""
    assert invariant in _quoted_invariants()


def test_tests_quote_only_invariants_that_exist() -> None:
    """A quoted number that DESIGN.md does not have is a mistake or a promise forgotten."""
    assert _quoted_invariants() <= set(INVARIANTS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    """Each relative link names a file of the project."""
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_tests_that_reliability_names_exist() -> None:
    """Each promise of docs/reliability.md names tests that are there, in the files it says."""
    module, names = "", 0
    for found in re.finditer(
        r"`(\w+/test_\w+\.py)`|\b(test_\w+)\b(?!\.py)", (ROOT / "docs/reliability.md").read_text()
    ):
        if found[1]:
            module = (ROOT / "tests" / found[1]).read_text()
        else:
            names += 1
            assert f"def {found[2]}(" in module, found[2]
    assert names > 30
