"""Which requests to the embedded Glance go wrong, and how.

Pure: it decides, the server acts.  A plan is plain data, so that a test can send it to a subprocess.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["record", "list", "data", "any"]
Action = Literal[
    "status",  # answer `status` (503) with `headers` and an empty body
    "delay",  # wait `seconds`, then answer as ever
    "reset",  # close the connection without an answer
    "redirect",  # 302 to `location`
    "empty_204",  # as Glance does when the store lost the file
    "short_body",  # announce the full length, close after `bytes`
    "stall",  # after `bytes` of the body send nothing for `seconds` (None: for ever), then the rest
    "whole_body",  # the whole image where a range was asked, as `status` (200) or 206
    "wrong_content_range",  # the right bytes under a Content-Range one byte off
]


@dataclass(frozen=True, slots=True)
class FaultRule:
    """One fault: it befalls `count` requests (None: every one) from the `first`, counted from 1.

    Only requests of this `kind` and, if given, this `image_id` count.
    """

    action: Action
    kind: Kind = "data"
    image_id: str | None = None
    first: int = 1
    count: int | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    bytes: int = 0
    seconds: float | None = None
    location: str = ""


class FaultPlan:
    """Rules, and how many requests each has seen; the first rule that fits acts."""

    def __init__(self, *rules: FaultRule) -> None:
        self.rules = rules
        self._seen = [0] * len(rules)

    def fault_nowait(self, kind: str, image_id: str | None) -> FaultRule | None:
        """Count a request and return the fault that befalls it."""
        fault = None
        for number, rule in enumerate(self.rules):
            if rule.kind not in (kind, "any") or rule.image_id not in (None, image_id):
                continue
            self._seen[number] += 1
            past = self._seen[number] - rule.first
            if fault is None and past >= 0 and (rule.count is None or past < rule.count):
                fault = rule
        return fault

    def to_json(self) -> list[dict[str, Any]]:
        """Return the rules as JSON values, without the counts."""
        return [asdict(rule) for rule in self.rules]

    @classmethod
    def from_json(cls, rules: list[dict[str, Any]]) -> FaultPlan:
        """Return the plan that `to_json` wrote.  Raises TypeError for anything else."""
        return cls(*(FaultRule(**rule) for rule in rules))
