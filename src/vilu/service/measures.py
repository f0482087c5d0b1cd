"""Prometheus metrics for requests, batches, answers, and every guarantee's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, exposition
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vilu.calibration.monitor.status import Status
from vilu.service.journals import Journals, ServiceState
from vilu.service.limits import InProgress

SECONDS_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets for the time to answer, in seconds."""

BATCH_SIZE_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Upper bounds of the buckets for the batch size, in images."""


class CountedAnswer(Protocol):
    """The part of an answer that ``Measures.count_answers`` reads."""

    @property
    def decision(self) -> str | None:
        """The decision, "accept" or "review". None without a rule."""

    @property
    def reason(self) -> str | None:
        """Why the answer is not accepted. None for an accepted answer."""


class MeasuredPredictor(Protocol):
    """The part of a served predictor that the gauges read."""

    fingerprint: str


class MeasuredEngine(Protocol):
    """The part of the engine that the gauges read."""

    @property
    def journals(self) -> Journals:
        """The journals with the guarantees' states."""

    @property
    def served_predictors(self) -> Mapping[str, MeasuredPredictor]:
        """Maps each predictor name to the predictor."""


class Measures:
    """A service's metrics, in a separate Prometheus registry.

    Args:
        in_progress: The requests in progress.
        get_engine: Returns the service's engine, or None while the engine is loading.
    """

    def __init__(
        self, in_progress: InProgress, get_engine: Callable[[], MeasuredEngine | None]
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(in_progress, get_engine))
        self._request_counter = Counter(
            "vilu_requests",
            "Requests, by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self._seconds_histogram = Histogram(
            "vilu_request_seconds",
            "Time to answer a request.",
            ["path"],
            buckets=SECONDS_BUCKETS,
            registry=self.registry,
        )
        self._answer_counter = Counter(
            "vilu_answers",
            "Images and rows that were answered.",
            ["decision", "reason"],
            registry=self.registry,
        )
        self.batch_size_histogram = Histogram(
            "vilu_batch_images",
            "Images of a batch.",
            buckets=BATCH_SIZE_BUCKETS,
            registry=self.registry,
        )

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request, and note the duration in seconds."""
        self._request_counter.labels(path, str(status)).inc()
        self._seconds_histogram.labels(path).observe(seconds)

    def count_answers(self, answers: Iterable[CountedAnswer]) -> None:
        """Count answers by decision and reason."""
        for answer in answers:
            self._answer_counter.labels(answer.decision or "none", answer.reason or "none").inc()

    def render(self) -> tuple[bytes, str]:
        """Return the metrics in Prometheus' text format, and this text's content type."""
        return exposition.generate_latest(self.registry), exposition.CONTENT_TYPE_LATEST


class _Gauges(Collector):
    """The gauges. Their values are read anew at every request for the metrics."""

    def __init__(
        self, in_progress: InProgress, get_engine: Callable[[], MeasuredEngine | None]
    ) -> None:
        self.in_progress = in_progress
        self.get_engine = get_engine

    def describe(self) -> list[Metric]:
        """Announce no metric to the registry: the predictors are unknown until the engine loads."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield gauges for the work in progress, and every predictor's guarantee and monitor."""
        yield GaugeMetricFamily(
            "vilu_images_under_way", "Images that wait for an answer.", self.in_progress.n_images
        )
        yield GaugeMetricFamily(
            "vilu_images_under_way_limit",
            "Maximum number of waiting images; further requests get 429.",
            self.in_progress.limits.max_queued_images,
        )
        yield GaugeMetricFamily(
            "vilu_bytes_under_way", "Bytes of the bodies in progress.", self.in_progress.n_bytes
        )
        yield GaugeMetricFamily(
            "vilu_bytes_under_way_limit",
            "Maximum number of bytes in progress; further requests get 429.",
            self.in_progress.max_total_bytes,
        )
        engine = self.get_engine()
        if engine is None:
            yield _ready_gauge(is_ready=False)
            return
        state = engine.journals.state()
        statuses = engine.journals.statuses()
        predictors = engine.served_predictors
        fingerprints = {name: predictor.fingerprint for name, predictor in predictors.items()}
        yield _ready_gauge(is_ready=state.is_writable and not state.has_lost_journal)
        yield from _guarantee_gauges(state, fingerprints)
        statuses_by_fingerprint = {fingerprints[name]: status for name, status in statuses.items()}
        yield from _monitor_gauges(statuses_by_fingerprint)


def _ready_gauge(*, is_ready: bool) -> Metric:
    description = "1 while the model is loaded and rows can be written to the journal."
    return GaugeMetricFamily("vilu_ready", description, float(is_ready))


def _guarantee_gauges(state: ServiceState, fingerprints: Mapping[str, str]) -> Iterator[Metric]:
    """Yield gauges for the answering predictor, and for every guarantee's state.

    Args:
        state: The service's state.
        fingerprints: Maps each predictor name to the predictor's fingerprint.
    """
    answering_gauge = _predictor_gauge("answers_now", "1 for the predictor that answers, else 0.")
    holds_gauge = _predictor_gauge("guarantee_holds", "1 if the guarantee holds, else 0.")
    void_gauge = _predictor_gauge("guarantee_void", "1 if the guarantee is void, else 0.")
    for name, fingerprint in fingerprints.items():
        guarantee = state.guarantees[name]
        answering_gauge.add_metric([fingerprint], float(name == state.answering_name))
        holds_gauge.add_metric([fingerprint], float(guarantee == "holds"))
        void_gauge.add_metric([fingerprint], float(guarantee == "void"))
    yield from (answering_gauge, holds_gauge, void_gauge)


EVIDENCE_GAUGES: Final = {
    "log_wealth": (
        "Log of the evidence against the guarantee; the alarm is at minus the log of the level."
    ),
    "level": "Probability that this test ever raises an alarm without cause.",
}
"""Maps an attribute of a monitor's test to the description of its gauge."""

AUDIT_GAUGES: Final = {
    "n": "Number of accepted answers whose labels have arrived.",
    "wrong": "Number of accepted answers whose labels show that they are wrong.",
    "lower": "Lower bound of the error rate of accepted answers.",
    "upper": "Upper bound of the error rate of accepted answers.",
    "guarantee": "Guaranteed maximum of the error rate of accepted answers.",
}
"""Maps an attribute of the audit to the description of its gauge."""


def _monitor_gauges(statuses: Mapping[str, Status]) -> Iterator[Metric]:
    """Yield the monitors' gauges. ``statuses`` maps each predictor's fingerprint to a status."""
    rows_gauge = _predictor_gauge("monitor_rows", "Rows that the monitor has seen.")
    for fingerprint, status in statuses.items():
        rows_gauge.add_metric([fingerprint], float(status.rows))
    yield rows_gauge
    for attribute, description in EVIDENCE_GAUGES.items():
        gauge = _predictor_gauge(f"monitor_{attribute}", description, "test")
        for fingerprint, status in statuses.items():
            for test in status.tests:
                gauge.add_metric([fingerprint, test.name], float(getattr(test, attribute)))
        yield gauge
    for attribute, description in AUDIT_GAUGES.items():
        gauge = _predictor_gauge(f"audit_{attribute}", description)
        for fingerprint, status in statuses.items():
            if status.audit is not None:
                gauge.add_metric([fingerprint], float(getattr(status.audit, attribute)))
        yield gauge


def _predictor_gauge(name: str, description: str, *labels: str) -> GaugeMetricFamily:
    """Make a gauge without values. The labels are "predictor", then ``labels``."""
    return GaugeMetricFamily(f"vilu_{name}", description, labels=["predictor", *labels])
