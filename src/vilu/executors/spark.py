"""Tasks of a Spark application, or of a Spark of our own on this machine."""

from __future__ import annotations

import gc
import hashlib
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from vilu.backbones.loading import import_extra
from vilu.errors import MissingModelError, StorageError
from vilu.executors.base import Worker, check_processes, cores, pack_job, receipt_of, take_gpu, threads_per_process
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt

MAX_FAILURES = 6
"""Attempts at a part in a Spark of our own; a job sets a crashing part aside before that."""

SUBMITTED = "PYSPARK_GATEWAY_PORT"
"""Set by ``spark-submit``, which brings its own settings."""

POLL = 0.05
"""Seconds between looks at what has arrived."""

_held: dict[str, Worker] = {}
"""What this Python worker works on, by the hash of the job."""


class SparkExecutor:
    """One Spark task per part; each Python worker holds the job, so the model is loaded once in each.

    An active ``SparkContext``, or that of ``spark-submit``, is used and left running; otherwise one of our own runs
    here and is stopped at the end. Exactly-once comes from the parts' files, so retries and speculation do no harm.
    Receipts come back through an accumulator, which Spark updates as tasks succeed, once per part.

    Args:
        processes: Tasks at a time in a Spark of our own; by default one per core. A given context decides by itself.

    Raises:
        UsageError: If there is no process.
        MissingModelError: If PySpark is not installed.
    """

    name = "spark"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes) or cores()
        self._spark = import_extra("pyspark", "spark")

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts, as parts are done.

        Raises:
            StorageError: If Spark gave a part up.
            MissingModelError: If Java is missing.
            Exception: What a part raised.
        """
        if not parts:
            return
        with self._context() as (context, threads):
            payload = pack_job(job, threads)
            held = context.broadcast(payload)
            arrived = context.accumulator([], _Outcomes())
            task = partial(_run, held, hashlib.sha256(payload).hexdigest(), arrived)
            tasks = context.parallelize(list(parts), len(parts)).map(task)
            action = _Action(self._spark, context, tasks)
            try:
                n = 0
                while action.goes_on() or n < len(arrived.value):
                    for packed in arrived.value[n:]:
                        n += 1
                        yield receipt_of(packed)
                action.check(n, len(parts))
            finally:
                action.cancel()
                held.unpersist()

    @contextmanager
    def _context(self) -> Iterator[tuple[Any, int]]:
        """The active context, or one of our own for the time being; and threads per task."""
        active = self._spark.SparkContext._active_spark_context
        if active is None and SUBMITTED in os.environ:
            active = self._spark.SparkContext.getOrCreate()
        if active is not None:
            yield active, int(active.getConf().get("spark.task.cpus", "1"))
            return
        settings = {
            "spark.master": f"local[{self.processes},{MAX_FAILURES}]",
            "spark.app.name": "vilu",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "OFF",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
        }
        conf = self._spark.SparkConf().setAll(list(settings.items()))
        try:
            context = self._spark.SparkContext(conf=conf)
        except self._spark.errors.PySparkRuntimeError as error:
            raise MissingModelError(f"Spark did not start; it needs Java 17 or later on the path ({error}).") from error
        context.pythonExec = sys.executable  # workers of this very environment
        try:
            yield context, threads_per_process(self.processes)
        finally:
            context.stop()


class _Action:
    """The Spark job, in a thread of its own, so that the driver can take receipts meanwhile."""

    def __init__(self, spark: Any, context: Any, tasks: Any) -> None:  # noqa: ANN401 - PySpark's
        self._context = context
        self._group = f"vilu-{secrets.token_hex(4)}"
        self._error: Exception | None = None
        self._tasks = tasks
        self._thread = spark.InheritableThread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        try:
            self._context.setJobGroup(self._group, "vilu")
            self._tasks.collect()
        # not swallowed: an exception ends with its thread unless it is handed over; check() raises it in the driver's
        except Exception as error:  # noqa: BLE001
            self._error = error

    def goes_on(self) -> bool:
        """Wait a moment; whether it is still at work."""
        self._thread.join(POLL)
        return bool(self._thread.is_alive())

    def check(self, arrived: int, expected: int) -> None:
        """Make sure that all is well at the end.

        Raises:
            StorageError: If it is not.
        """
        if self._error is not None:
            raise StorageError(f"Spark gave up: {_reason(self._error)} Finished parts are kept.") from self._error
        if arrived != expected:
            raise StorageError(f"Spark ended with {arrived} receipts for {expected} parts. Finished parts are kept.")

    def cancel(self) -> None:
        """Stop what is still at work."""
        if self._thread.is_alive():
            self._context.cancelJobGroup(self._group)
            self._thread.join()


def _reason(error: Exception) -> str:
    """The line of Spark's stack trace that says something."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "SparkException" in line), lines[0])


class _Outcomes:
    """How Spark adds up an accumulator: a list of packed outcomes (PySpark's ``AccumulatorParam``)."""

    def zero(self, _: list[bytes]) -> list[bytes]:
        """Of a task."""
        return []

    def addInPlace(self, some: list[bytes], more: list[bytes]) -> list[bytes]:  # noqa: N802 - PySpark's name
        """Those of one task more."""
        some += more
        return some


def _run(held: Any, key: str, arrived: Any, part: int) -> None:  # noqa: ANN401 - PySpark's
    """A task, in a Python worker."""
    from pyspark import TaskContext

    if key not in _held:
        context = TaskContext.get()
        gpu = context.resources().get("gpu") if context else None
        if gpu:
            take_gpu(int(gpu.addresses[0]))
        _held.clear()
        _held[key] = Worker(held.value)
        gc.freeze()  # PySpark collects garbage after every task, which takes 0.2 s where torch is imported
    arrived.add([_held[key].outcome(part)])
