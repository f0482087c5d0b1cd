"""Parts done on a cluster: Ray and Spark."""

from __future__ import annotations

import gc
import logging
import math
import os
import secrets
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from vilu.artifacts.hashing import bytes_hash
from vilu.errors import MissingModelError, StorageError
from vilu.extras import import_extra, quiet, setting
from vilu.store.executors.local import (
    Worker,
    check_processes,
    pack_job,
    receipt_of,
    take_gpu,
    threads_per_process,
)
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt
from vilu.store.mapped import cores

STORE_BYTES = 2**28
"""Shared memory of a Ray of our own.

Only part numbers, receipts and the job go through it; Ray spills the rest.
"""


class RayExecutor:
    """Ray Data over part numbers: each actor holds the job, so the model is loaded once per actor.

    A Ray that runs already, in this process or at ``RAY_ADDRESS``, is used and left running;
    otherwise one is started on this machine and shut down at the end. Exactly-once comes from the
    parts' files, not from Ray: an actor that dies is restarted and its part done again. Nothing
    here counts deaths, the job sets aside a part that keeps crashing.

    By default there is one actor per core of this machine, or on a cluster one per GPU, or per core
    where it has none.
    """

    name = "ray"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes)
        self._ray = import_extra("ray", "ray")
        self._data = import_extra("ray.data", "ray")

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts, as parts are done."""
        if not parts:
            return
        with (
            self._cluster() as actors,
            self._settings(),
            closing(self._rows(job, parts, actors)) as rows,
        ):
            while True:
                with quiet():  # not around the yield: the driver has things to say
                    row = next(rows, None)
                if row is None:
                    return
                yield receipt_of(row["outcome"])

    def _rows(
        self, job: EmbedJob, parts: Sequence[int], actors: _Actors
    ) -> Generator[dict[str, Any], None, None]:
        """A row per part, as Ray hands them out.

        Closing it ends Ray's threads, which must not outlive a shutdown.
        """
        items = [{"part": part} for part in parts]
        done = self._data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(pack_job(job, actors.threads),),
            batch_size=1,
            compute=self._data.ActorPoolStrategy(size=min(actors.number, len(items))),
            num_cpus=actors.threads,
            num_gpus=actors.gpus,
            max_restarts=-1,
            max_task_retries=-1,
        )
        yield from done.iter_rows()

    @contextmanager
    def _cluster(self) -> Iterator[_Actors]:
        """Actors of the Ray that is there, or of one of our own for the time being."""
        if self._ray.is_initialized():
            yield self._actors()
            return
        address = os.environ.get("RAY_ADDRESS")
        processes = self.processes or cores()
        if address:
            start: dict[str, object] = {"address": address}
        else:
            start = {
                "address": "local",
                "num_cpus": max(processes, cores()),
                "include_dashboard": False,
                "object_store_memory": STORE_BYTES,
            }
        with quiet():
            self._ray.init(**start, log_to_driver=False, logging_level=logging.ERROR)
        try:
            if address:
                yield self._actors()
            else:
                yield _Actors(processes, threads_per_process(processes), self._gpus(processes))
        finally:
            self._ray.shutdown()

    def _actors(self) -> _Actors:
        """As many as fit, each with an equal share of its machine.

        Where any machine has GPUs, they are on the machines with GPUs only.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        with_gpu = [machine for machine in machines if machine.get("GPU")]
        with_cpu = [machine for machine in machines if machine.get("CPU")]
        kind = "GPU" if with_gpu else "CPU"
        usable = with_gpu or with_cpu
        room = int(sum(machine[kind] for machine in usable))
        number = self.processes or max(1, room)
        per_machine = math.ceil(number / max(1, len(usable)))
        # of unlike machines the smallest counts: an actor must fit on any of them
        fewest_cores = int(min((machine.get("CPU", 1) for machine in usable), default=1))
        threads = max(1, fewest_cores // per_machine)
        return _Actors(number, threads, self._gpus(number))

    def _gpus(self, actors: int) -> float | None:
        """GPUs per actor: one, or an even share where there are fewer than actors; None without."""
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        if gpus == 0:
            return None
        return 1 / math.ceil(actors / gpus)

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Quiet, and patient: a part may take hours, and actors may die while a machine starts."""
        with quiet():
            context = self._data.DataContext.get_current()
        wanted = {
            "enable_progress_bars": False,
            "execution_no_progress_timeout_s": -1,
            "max_consecutive_actor_init_deaths": 5,
        }
        # older and newer Rays do not have all of them
        known = {name: value for name, value in wanted.items() if hasattr(context, name)}
        with setting(context, **known):
            yield


@dataclass(frozen=True)
class _Actors:
    """How many actors, threads of each, and its share of a GPU."""

    number: int
    threads: int
    gpus: float | None


class _Actor:
    """A worker process of Ray."""

    def __init__(self, payload: bytes) -> None:
        self._worker = Worker(payload)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """One row: the number of a part to its outcome."""
        (part,) = batch["part"]
        return {"outcome": np.array([self._worker.outcome(int(part))], dtype=object)}


# attempts at a part in a Spark of our own; a job sets a crashing part aside before that
MAX_FAILURES = 6
SUBMITTED = "PYSPARK_GATEWAY_PORT"  # set by ``spark-submit``, which brings its own settings
POLL = 0.05  # seconds between looks at what has arrived
_held: dict[str, Worker] = {}  # what this Python worker works on, by the hash of the job


class SparkExecutor:
    """One Spark task per part; each Python worker holds the job, so it loads the model once.

    An active ``SparkContext``, or that of ``spark-submit``, is used and left running; otherwise one
    of our own runs here and is stopped at the end. Exactly-once comes from the parts' files, so
    retries and speculation do no harm. Receipts come back through an accumulator, which Spark
    updates as tasks succeed, once per part.
    """

    name = "spark"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes) or cores()
        self._spark = import_extra("pyspark", "spark")

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts, as parts are done."""
        if not parts:
            return
        with self._context() as (context, threads):
            payload = pack_job(job, threads)
            held = context.broadcast(payload)
            arrived = context.accumulator([], _Outcomes())
            task = partial(_run, held, bytes_hash(payload), arrived)
            tasks = context.parallelize(list(parts), len(parts)).map(task)
            action = _Action(self._spark, context, tasks)
            try:
                n_taken = 0
                # the last receipts may arrive in the moment in which the action ends
                while action.goes_on() or n_taken < len(arrived.value):
                    for packed in arrived.value[n_taken:]:
                        n_taken += 1
                        yield receipt_of(packed)
                action.check(n_taken, len(parts))
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
        context = self._start()
        try:
            yield context, threads_per_process(self.processes)
        finally:
            context.stop()

    def _start(self) -> Any:  # noqa: ANN401 - PySpark's
        """A Spark of our own on this machine."""
        settings = {
            "spark.master": f"local[{self.processes},{MAX_FAILURES}]",
            "spark.app.name": "vilu",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.log.level": "OFF",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
        }
        try:
            conf = self._spark.SparkConf().setAll(list(settings.items()))
            context = self._spark.SparkContext(conf=conf)
        except self._spark.errors.PySparkRuntimeError as error:
            raise MissingModelError(
                f"Spark did not start; it needs Java 17 or later on the path ({error})."
            ) from error
        context.pythonExec = sys.executable  # workers of this very environment
        return context


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
        # not swallowed: an exception ends with its thread unless it is handed over; check() raises
        # it in the driver's
        except Exception as error:  # noqa: BLE001
            self._error = error

    def goes_on(self) -> bool:
        """Wait a moment; whether it is still at work."""
        self._thread.join(POLL)
        return bool(self._thread.is_alive())

    def check(self, arrived: int, expected: int) -> None:
        """Make sure that all is well at the end."""
        if self._error is not None:
            reason = _reason(self._error)
            raise StorageError(f"Spark gave up: {reason} Finished parts are kept.") from self._error
        if arrived != expected:
            raise StorageError(
                f"Spark ended with {arrived} receipts for {expected} parts. Finished parts are "
                "kept."
            )

    def cancel(self) -> None:
        """Stop what is still at work."""
        if self._thread.is_alive():
            self._context.cancelJobGroup(self._group)
            self._thread.join()


class _Outcomes:
    """How Spark adds up an accumulator of packed outcomes (PySpark's ``AccumulatorParam``)."""

    def zero(self, _: list[bytes]) -> list[bytes]:
        """Of a task."""
        return []

    def addInPlace(self, total: list[bytes], more: list[bytes]) -> list[bytes]:  # noqa: N802
        """The outcomes with those of one task more."""
        total += more
        return total


def _reason(error: Exception) -> str:
    """The line of a long stack trace that says what was wrong."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return next((line for line in lines if "SparkException" in line), lines[0])


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
        # PySpark collects garbage after every task, which takes 0.2 s where torch is imported
        gc.freeze()
    arrived.add([_held[key].outcome(part)])
