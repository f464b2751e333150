"""Metrics: the status in numbers, in Prometheus' own format, and the table of docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lazyimg.metrics import METRICS, render

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def image(
    state: str, size_bytes: int, present_bytes: int, open_handles: int = 0, **more: Any
) -> dict[str, Any]:
    return {
        "state": state,
        "size_bytes": size_bytes,
        "present_bytes": present_bytes,
        "open_handles": open_handles,
        "missing_bytes": size_bytes - present_bytes,
        "at_risk": open_handles > 0 and present_bytes < size_bytes,
        **more,
    }


STATUS: dict[str, Any] = {
    "version": "1.2",
    "view": "raw",
    "started_at_s": 1.5e9,
    "memory_bytes": 31 << 20,
    "descriptors": 40,
    "cache_is_full": True,
    "cache_used_bytes": 1 << 40,
    "cache_found": {"damaged_chunks": 6},
    "requests": 7,
    "fetched_bytes": 70,
    "retries": 2,
    "unforeseen_errors": 1,
    "disk_state": "unstable",
    "disk_errors": 6,
    "disk_stuck_operations": 2,
    "disk_bypassed_bytes": 4096,
    "glance": {
        "is_down": True,
        "hedges": 15,
        "hedges_won": 14,
        "endpoints": [{"state": "open"}, {"state": "closed"}, {"state": "open"}],
    },
    "reads_in_flight": 9,
    "reads_hung": 4,
    "oldest_read_s": 12.5,
    "requests_in_flight": 11,
    "requests_stuck": 5,
    "images": [
        image("lazy", 100, 30, open_handles=2, waiting_chunks=3),
        image("lazy", 100, 40),
        image("whole", 50, 50, open_handles=1),
        image("refused", 1000, 0),
    ],
}


def scraped(status: dict[str, Any]) -> dict[tuple[str, ...], float]:
    """Return each sample by its name and the values of its labels, as Prometheus' own parser reads the page."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(render(status).decode())
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("sample", "value"),
    [
        (("info", "1.2", "raw"), 1),
        (("start_time_seconds",), 1.5e9),
        (("resident_memory_bytes",), 31 << 20),
        (("open_descriptors",), 40),
        (("images", "lazy"), 2),
        (("images", "whole"), 1),
        (("images", "refused"), 1),
        (("open_images",), 2),
        (("images_at_risk",), 1),
        (("at_risk_missing_bytes",), 70),
        (("present_bytes",), 120),
        (("missing_bytes",), 130),
        (("requests_total",), 7),
        (("fetched_bytes_total",), 70),
        (("retries_total",), 2),
        (("waiting_chunks",), 3),
        (("cache_full",), 1),
        (("cache_used_bytes",), 1 << 40),
        (("damaged_chunks_total",), 6),
        (("unforeseen_errors_total",), 1),
        (("cache_disk", "normal"), 0),
        (("cache_disk", "unstable"), 1),
        (("cache_disk_errors_total",), 6),
        (("cache_disk_stuck",), 2),
        (("bypassed_bytes_total",), 4096),
        (("hedges_total",), 15),
        (("hedges_won_total",), 14),
        (("glance_down",), 1),
        (("glance_endpoints", "open"), 2),
        (("glance_endpoints", "closed"), 1),
        (("reads_in_flight",), 9),
        (("reads_hung",), 4),
        (("oldest_read_seconds",), 12.5),
        (("requests_in_flight",), 11),
        (("requests_stuck",), 5),
    ],
)
def test_each_metric_says_what_status_says(sample: tuple[str, ...], value: float) -> None:
    """Numbers come from the status, sums only from images that are shown."""
    assert scraped(STATUS)[(f"lazyimg_{sample[0]}", *sample[1:])] == value


def test_every_metric_has_a_sample_here() -> None:
    """No metric is without a value in a status that says everything."""
    assert {name for name, *_ in scraped(STATUS)} == {metric.name for metric in METRICS}


def test_what_a_status_lacks_has_no_sample() -> None:
    """A metric of what the daemon cannot know is absent, not zero."""
    names = {name for name, *_ in scraped({"images": [], "cache_used_bytes": None})}
    assert "lazyimg_cache_used_bytes" not in names
    assert "lazyimg_open_descriptors" not in names


def test_names_are_as_prometheus_wants_them() -> None:
    """A prefix, a counter ends in _total, a unit is the last word before it."""
    for metric in METRICS:
        assert re.fullmatch(r"lazyimg_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert re.fullmatch(r"(?!.*_(bytes|seconds)_(?!total$)).*", metric.name), metric.name
        assert not set(metric.labels) & {"image", "id", "name"}


def test_document_has_the_table_of_the_code() -> None:
    """docs/metrics.md has one row for each metric, with type, labels and meaning, and no other row."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|(.*?)\| (.*?) \|$", DOCUMENT.read_text(), re.MULTILINE)
    documented = [
        (name, kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows
    ]
    assert documented == [(m.name, m.kind, m.labels, m.meaning) for m in METRICS]
