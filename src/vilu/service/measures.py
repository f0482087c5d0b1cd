"""What Prometheus is told: requests, batches, answers, and the state of every promise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, exposition
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vilu.service.kept import Keeps
from vilu.service.limits import Room

SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Answered(Protocol):
    """What is counted of an answer."""

    @property
    def decision(self) -> str | None:
        """Accept or abstain."""

    @property
    def reason(self) -> str | None:
        """Why it is not accepted."""


class Identified(Protocol):
    """A predictor that is served."""

    fingerprint: str


class Measured(Protocol):
    """What is read of an engine when somebody asks."""

    @property
    def keeper(self) -> Keeps:
        """Who knows the promises."""

    @property
    def served(self) -> Mapping[str, Identified]:
        """The predictors by name."""


class Measures:
    """Counters of one service, in a registry of their own."""

    def __init__(self, room: Room, engine: Callable[[], Measured | None]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Promises(room, engine))
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

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count one."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def answered(self, answers: Iterable[Answered]) -> None:
        """Count what was decided."""
        for answer in answers:
            self._answers.labels(answer.decision or "none", answer.reason or "none").inc()

    def exposed(self) -> tuple[bytes, str]:
        """The text, and its content type."""
        return exposition.generate_latest(self.registry), exposition.CONTENT_TYPE_LATEST


class _Promises(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, room: Room, engine: Callable[[], Measured | None]) -> None:
        self.room, self.engine = room, engine

    def describe(self) -> list[Metric]:
        """Nothing in advance: what there is depends on the predictors."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The queue, and of every predictor its promise, the evidence against it, and the audit."""
        room, engine = self.room, self.engine()
        yield GaugeMetricFamily(
            "vilu_images_under_way", "Images that wait for their answers.", room.taken
        )
        yield GaugeMetricFamily(
            "vilu_images_under_way_limit", "More are sent away with 429.", room.most
        )
        ready = "vilu_ready", "1 while the model is loaded and rows can be kept."
        if engine is None:
            yield GaugeMetricFamily(*ready, 0.0)
            return
        state = engine.keeper.kept()
        statuses = engine.keeper.statuses()
        yield GaugeMetricFamily(*ready, float(not state.lost))
        who = {name: predictor.fingerprint for name, predictor in engine.served.items()}
        now = ((who[name], name == state.answering) for name in who)
        yield _gauge("answers_now", "1 of the predictor that answers.", now)
        for verdict, words in (("holds", "holds"), ("void", "is void")):
            promises = ((who[name], value == verdict) for name, value in state.promises.items())
            yield _gauge(f"promise_{verdict}", f"1 where it {words}.", promises)
        rows = ((who[name], status.rows) for name, status in statuses.items())
        yield _gauge("monitor_rows", "Rows that the monitor has seen.", rows)
        for part, description in EVIDENCE.items():
            tests = (
                (who[name], getattr(test, part), test.name)
                for name, s in statuses.items()
                for test in s.tests
            )
            yield _gauge(f"monitor_{part}", description, tests, "test")
        for part, description in AUDIT.items():
            audits = (
                (who[name], getattr(s.audit, part))
                for name, s in statuses.items()
                if s.audit is not None
            )
            yield _gauge(f"audit_{part}", description, audits)


EVIDENCE: Final = {
    "log_wealth": "Log of the odds against the promise; the alarm is at minus the log of the level.",
    "level": "Probability that this test ever raises an alarm without cause.",
}
AUDIT: Final = {
    "n": "Accepted answers whose labels have arrived.",
    "wrong": "How many of them are wrong.",
    "lower": "Lower bound of the error rate of accepted answers.",
    "upper": "Upper bound of the error rate of accepted answers.",
    "guarantee": "Error rate of accepted answers that is guaranteed at most.",
}


def _gauge(name: str, description: str, values: Iterable[tuple[Any, ...]], *labels: str) -> Metric:
    """A number per predictor, and whatever else the values say after it."""
    gauge = GaugeMetricFamily(f"vilu_{name}", description, labels=["predictor", *labels])
    for predictor, value, *more in values:
        gauge.add_metric([predictor, *more], float(value))
    return gauge
