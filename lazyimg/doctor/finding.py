"""What a check found: a line for a person, an object for a program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One check's outcome.

    state: "fail" where lazyimg cannot work so, "warn" where it works worse or an accident would cost more.
    seen: what was found.  advice: what to do, None where all is well.
    """

    check: str
    state: State
    seen: str
    advice: str | None = None


def ok(check: str, seen: str) -> Finding:
    return Finding(check, "ok", seen)


def warn(check: str, seen: str, advice: str) -> Finding:
    return Finding(check, "warn", seen, advice)


def fail(check: str, seen: str, advice: str) -> Finding:
    return Finding(check, "fail", seen, advice)
