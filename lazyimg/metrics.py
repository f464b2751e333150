"""What Prometheus sees: `lazyimg status` in numbers, made anew at each scrape.

Nothing is counted here or for it: each metric is read out of the object of `lazyimg status --json`, so that both
always say the same.  No label names an image: a host sees thousands in its life, and status names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

DISK_STATES = ("normal", "unstable", "bypass")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Status = Mapping[str, Any]
# Values of the labels, then the value itself.
Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: `samples` reads it out of a status, nothing where the daemon does not say it."""

    name: str
    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    meaning: str
    samples: Callable[[Status], Iterable[Sample]]

    def family(self, status: Status) -> GaugeMetricFamily | CounterMetricFamily:
        """Return it as prometheus-client writes it."""
        make = GaugeMetricFamily if self.kind == "gauge" else CounterMetricFamily
        family = make(self.name, self.meaning, labels=self.labels)
        for labels, value in self.samples(status):
            family.add_metric(labels, value)
        return family


def render(status: Status) -> bytes:
    """Return the page that Prometheus reads (text format 0.0.4)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_StatusCollector(status))
    return generate_latest(registry)


class _StatusCollector(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        return (metric.family(self._status) for metric in METRICS)


# ── how a metric is read out of the status ──


def _field(name: str) -> Callable[[Status], Iterable[Sample]]:
    """A number or a yes of the status itself."""

    def samples(status: Status) -> Iterator[Sample]:
        if status.get(name) is not None:
            yield (), float(status[name])

    return samples


def _part(name: str, field: str) -> Callable[[Status], Iterable[Sample]]:
    """A number or a yes of one of the status's objects."""
    return lambda status: _field(field)(status.get(name, {}))


def _of_images(value: Callable[[Status], float]) -> Callable[[Status], Iterable[Sample]]:
    """A sum over all images that are shown."""

    def samples(status: Status) -> Iterator[Sample]:
        yield (), float(sum(value(one) for one in status["images"] if one["state"] != "refused"))

    return samples


def _images_by_state(status: Status) -> Iterator[Sample]:
    states = [one["state"] for one in status["images"]]
    return (((state,), float(states.count(state))) for state in sorted(set(states)))


def _endpoints_by_state(status: Status) -> Iterator[Sample]:
    states = [one["state"] for one in status.get("glance", {}).get("endpoints", ())]
    return (((state,), float(states.count(state))) for state in sorted(set(states)))


def _disk_state(status: Status) -> Iterator[Sample]:
    if "disk_state" in status:
        yield from (((state,), float(state == status["disk_state"])) for state in DISK_STATES)


def _version(status: Status) -> Iterator[Sample]:
    yield (str(status.get("version", "")), str(status.get("view", ""))), 1.0


def _missing_bytes(image: Status) -> int:
    missing: int = image["missing_bytes"]
    return missing


def _is_at_risk(image: Status) -> bool:
    return bool(image["at_risk"])


def _gauge(name: str, meaning: str, samples: Callable[[Status], Iterable[Sample]], *labels: str) -> Metric:
    return Metric(f"lazyimg_{name}", "gauge", labels, meaning, samples)


def _counter(name: str, meaning: str, samples: Callable[[Status], Iterable[Sample]]) -> Metric:
    return Metric(f"lazyimg_{name}_total", "counter", (), meaning, samples)


# docs/metrics.md has the same table, for people.
METRICS = (
    _gauge("info", "Always 1; what serves here.", _version, "version", "view"),
    _gauge("start_time_seconds", "Unix time of this daemon's start.", _field("started_at_s")),
    _gauge("resident_memory_bytes", "Memory of the daemon.", _field("memory_bytes")),
    _gauge("open_descriptors", "Open descriptors of the daemon.", _field("descriptors")),
    _gauge("images", "Images that the daemon knows.", _images_by_state, "state"),
    _gauge("open_images", "Images that guests hold open.", _of_images(lambda one: one["open_handles"] > 0)),
    _gauge(
        "images_at_risk",
        "Open images that are not whole: their guests depend on Glance.",
        _of_images(_is_at_risk),
    ),
    _gauge(
        "at_risk_missing_bytes",
        "What the images at risk lack.",
        _of_images(lambda one: _missing_bytes(one) if _is_at_risk(one) else 0),
    ),
    _gauge("present_bytes", "Bytes of images in the cache.", _of_images(lambda one: one["present_bytes"])),
    _gauge("missing_bytes", "Bytes of known images that are not in the cache.", _of_images(_missing_bytes)),
    _counter("requests", "Requests for bytes of images.", _field("requests")),
    _counter("fetched_bytes", "Bytes of images that Glance sent.", _field("fetched_bytes")),
    _counter("retries", "Pauses after a request that failed.", _field("retries")),
    _gauge(
        "waiting_chunks",
        "Chunks that are wanted and have not come.",
        _of_images(lambda one: one.get("waiting_chunks", 0)),
    ),
    _gauge("glance_down", "1 while nothing can be had of Glance.", _part("glance", "is_down")),
    _gauge(
        "glance_endpoints",
        "Endpoints of Glance, by the state of their breaker.",
        _endpoints_by_state,
        "state",
    ),
    _counter("hedges", "Requests that were slow and sent a second time.", _part("glance", "hedges")),
    _counter("hedges_won", "Those of which the second was answered first.", _part("glance", "hedges_won")),
    _gauge("reads_in_flight", "Reads of guests that wait.", _field("reads_in_flight")),
    _gauge("reads_hung", "Those that wait longer than 10 s.", _field("reads_hung")),
    _gauge("oldest_read_seconds", "How long the oldest of them waits.", _field("oldest_read_s")),
    _gauge(
        "requests_in_flight",
        "Requests of the kernel, of every kind, that wait.",
        _field("requests_in_flight"),
    ),
    _gauge(
        "requests_stuck", "Requests that a killed daemon took and nobody answers.", _field("requests_stuck")
    ),
    _gauge("cache_full", "1 while guests are served without storing.", _field("cache_is_full")),
    _gauge("cache_disk", "1 for the state that the cache disk is in.", _disk_state, "state"),
    _counter("cache_disk_errors", "Faults of the cache disk.", _field("disk_errors")),
    _gauge(
        "cache_disk_stuck",
        "Threads that wait for the cache disk longer than disk_timeout.",
        _field("disk_stuck_operations"),
    ),
    _counter(
        "bypassed_bytes",
        "Read from Glance because the cache disk did not give them.",
        _field("disk_bypassed_bytes"),
    ),
    _gauge("cache_used_bytes", "What images take on the cache disk.", _field("cache_used_bytes")),
    _counter(
        "damaged_chunks",
        "Chunks on the cache disk that were not what had been stored; they are fetched again.",
        _part("cache_found", "damaged_chunks"),
    ),
    _counter(
        "unforeseen_errors",
        "Requests that a fault of lazyimg's own failed.",
        _field("unforeseen_errors"),
    ),
)
