"""Metrics for Prometheus: requests, batches, answers, and the state of every guarantee."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, exposition
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vilu.calibration.monitor.status import Status
from vilu.service.journals import Journals, ServiceState
from vilu.service.limits import Places

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Answered(Protocol):
    """The part of an answer that is counted."""

    @property
    def decision(self) -> str | None:
        """Accept or review."""

    @property
    def reason(self) -> str | None:
        """Why it is not accepted."""


class Identified(Protocol):
    """A predictor that is served."""

    fingerprint: str


class Measured(Protocol):
    """What is read of an engine when somebody asks."""

    @property
    def journals(self) -> Journals:
        """They know the guarantees."""

    @property
    def served(self) -> Mapping[str, Identified]:
        """The predictors by name."""


class Measures:
    """Counters of one service, in a registry of their own."""

    def __init__(self, places: Places, engine: Callable[[], Measured | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Gauges(places, engine))
        self._requests = Counter(
            "vilu_requests",
            "Requests, by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "vilu_request_seconds",
            "Time to answer a request.",
            ["path"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self._answers = Counter(
            "vilu_answers",
            "Images and rows that were answered.",
            ["decision", "reason"],
            registry=self.registry,
        )
        self.batch = Histogram(
            "vilu_batch_images", "Images of a batch.", buckets=SIZES, registry=self.registry
        )

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count a request, and the time that it took."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_answers(self, answers: Iterable[Answered]) -> None:
        """Count what was decided."""
        for answer in answers:
            self._answers.labels(answer.decision or "none", answer.reason or "none").inc()

    def exposed(self) -> tuple[bytes, str]:
        """The text, and its content type."""
        return exposition.generate_latest(self.registry), exposition.CONTENT_TYPE_LATEST


class _Gauges(Collector):
    """Gauges that are read when somebody asks for them."""

    def __init__(self, places: Places, engine: Callable[[], Measured | None]) -> None:
        self.places = places
        self.engine = engine

    def describe(self) -> list[Metric]:
        """Nothing in advance: what there is depends on the predictors."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Images under way, and of every predictor its guarantee, the evidence, and the audit."""
        yield GaugeMetricFamily(
            "vilu_images_under_way", "Images that wait for their answers.", self.places.taken
        )
        yield GaugeMetricFamily(
            "vilu_images_under_way_limit", "More are sent away with 429.", self.places.most
        )
        engine = self.engine()
        if engine is None:
            yield _ready(is_ready=False)
            return
        state = engine.journals.state()
        statuses = engine.journals.statuses()
        fingerprints = {name: served.fingerprint for name, served in engine.served.items()}
        yield _ready(is_ready=not state.has_lost_journal)
        yield from _guarantees(state, fingerprints)
        yield from _evidence({fingerprints[name]: status for name, status in statuses.items()})


def _ready(*, is_ready: bool) -> Metric:
    description = "1 while the model is loaded and rows can be kept."
    return GaugeMetricFamily("vilu_ready", description, float(is_ready))


def _guarantees(state: ServiceState, fingerprints: Mapping[str, str]) -> Iterator[Metric]:
    """Which predictor answers, and the state of every guarantee."""
    answers = _gauge("answers_now", "1 of the predictor that answers.")
    holds = _gauge("guarantee_holds", "1 where it holds.")
    void = _gauge("guarantee_void", "1 where it is void.")
    for name, fingerprint in fingerprints.items():
        guarantee = state.guarantees[name]
        answers.add_metric([fingerprint], float(name == state.answering))
        holds.add_metric([fingerprint], float(guarantee == "holds"))
        void.add_metric([fingerprint], float(guarantee == "void"))
    yield from (answers, holds, void)


EVIDENCE: Final = {
    "log_wealth": (
        "Log of the odds against the guarantee; the alarm is at minus the log of the level."
    ),
    "level": "Probability that this test ever raises an alarm without cause.",
}
AUDIT: Final = {
    "n": "Accepted answers whose labels have arrived.",
    "wrong": "How many of them are wrong.",
    "lower": "Lower bound of the error rate of accepted answers.",
    "upper": "Upper bound of the error rate of accepted answers.",
    "guarantee": "Error rate of accepted answers that is guaranteed at most.",
}


def _evidence(statuses: Mapping[str, Status]) -> Iterator[Metric]:
    """What the monitors say, by the fingerprints of the predictors."""
    rows = _gauge("monitor_rows", "Rows that the monitor has seen.")
    for fingerprint, status in statuses.items():
        rows.add_metric([fingerprint], float(status.rows))
    yield rows
    for part, description in EVIDENCE.items():
        gauge = _gauge(f"monitor_{part}", description, "test")
        for fingerprint, status in statuses.items():
            for test in status.tests:
                gauge.add_metric([fingerprint, test.name], float(getattr(test, part)))
        yield gauge
    for part, description in AUDIT.items():
        gauge = _gauge(f"audit_{part}", description)
        for fingerprint, status in statuses.items():
            if status.audit is not None:
                gauge.add_metric([fingerprint], float(getattr(status.audit, part)))
        yield gauge


def _gauge(name: str, description: str, *labels: str) -> GaugeMetricFamily:
    """A gauge without values; each is to name the predictor, then what ``labels`` say."""
    return GaugeMetricFamily(f"vilu_{name}", description, labels=["predictor", *labels])
