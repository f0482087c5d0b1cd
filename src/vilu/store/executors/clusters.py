"""Executors that do parts on a cluster: Ray and Spark."""

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
from vilu.extras import import_extra, start_ray, suppress_messages, temporarily_set
from vilu.store.executors.local import (
    Worker,
    check_processes,
    pack_job,
    take_gpu,
    threads_per_process,
    unpack_receipt,
)
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt
from vilu.store.mapped import n_cores

SHARED_MEMORY_BYTES = 2**28
"""Size of the shared memory in a Ray started by vilu.

The shared memory holds only part numbers, receipts and the job. Ray writes to disk if the shared
memory is full.
"""


class RayExecutor:
    """An executor that does parts in Ray Data's actors (worker processes).

    Each actor keeps the job and loads the model once. If Ray is running in this process or at
    ``RAY_ADDRESS``, this Ray is used and left running. Otherwise, Ray is started on this machine
    and shut down at the end. If an actor dies, Ray restarts the actor, and the actor does the part
    again. A part may be done twice. Such a part is still stored once, because the files have fixed
    names. Dead actors are not counted here, because the job gives up a part that keeps crashing.

    ``processes`` is the number of actors. The default for a Ray started here is one actor per core
    on this machine. The default for an already running Ray is one actor per GPU, or one actor per
    core if there is no GPU.
    """

    name = "ray"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes)
        self._ray = import_extra("ray", "ray")
        self._data = import_extra("ray.data", "ray")

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """Yield the receipt of each part as soon as the part is done."""
        if not parts:
            return
        with (
            self._running_ray() as actor_plan,
            self._ray_data_settings(),
            closing(self._outcome_rows(job, parts, actor_plan)) as rows,
        ):
            while True:
                # around the yield, this would also suppress the caller's messages
                with suppress_messages():
                    row = next(rows, None)
                if row is None:
                    return
                yield unpack_receipt(row["outcome"])

    def _outcome_rows(
        self, job: EmbedJob, parts: Sequence[int], actor_plan: _ActorPlan
    ) -> Generator[dict[str, Any], None, None]:
        """Yield a row with each part's outcome, in any order.

        Closing this generator ends Ray Data's threads, which must end before Ray is shut down.
        """
        part_rows = [{"part": part} for part in parts]
        dataset = self._data.from_items(part_rows, override_num_blocks=len(part_rows))
        payload = pack_job(job, actor_plan.threads_per_actor)
        n_actors = min(actor_plan.n_actors, len(part_rows))
        actor_pool = self._data.ActorPoolStrategy(size=n_actors)
        outcomes = dataset.map_batches(
            _Actor,
            fn_constructor_args=(payload,),
            batch_size=1,
            compute=actor_pool,
            num_cpus=actor_plan.threads_per_actor,
            num_gpus=actor_plan.gpus_per_actor,
            max_restarts=-1,  # no limit
            max_task_retries=-1,  # no limit
        )
        yield from outcomes.iter_rows()

    @contextmanager
    def _running_ray(self) -> Iterator[_ActorPlan]:
        """Yield the plan for the actors. If Ray is not running yet, start Ray for the block."""
        if self._ray.is_initialized():
            yield self._plan_for_running_ray()
            return
        processes = self.processes or n_cores()
        n_cpus = max(processes, n_cores())
        has_joined_cluster = start_ray(
            num_cpus=n_cpus,
            include_dashboard=False,
            object_store_memory=SHARED_MEMORY_BYTES,
        )
        try:
            if has_joined_cluster:
                yield self._plan_for_running_ray()
            else:
                yield _ActorPlan(
                    n_actors=processes,
                    threads_per_actor=threads_per_process(processes),
                    gpus_per_actor=self._gpus_per_actor(processes),
                )
        finally:
            self._ray.shutdown()

    def _plan_for_running_ray(self) -> _ActorPlan:
        """Return the plan for the actors in a running Ray: as many as fit, with equal shares.

        If some machines have GPUs, actors run only on these machines.
        """
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpu_machines = [machine for machine in machines if machine.get("GPU")]
        cpu_machines = [machine for machine in machines if machine.get("CPU")]
        resource = "GPU" if gpu_machines else "CPU"
        used_machines = gpu_machines or cpu_machines
        n_fitting_actors = int(sum(machine[resource] for machine in used_machines))
        n_actors = self.processes or max(1, n_fitting_actors)
        actors_per_machine = math.ceil(n_actors / max(1, len(used_machines)))
        # an actor must fit on any machine, so the machine with the fewest cores decides
        fewest_cores = int(min((machine.get("CPU", 1) for machine in used_machines), default=1))
        threads_per_actor = max(1, fewest_cores // actors_per_machine)
        gpus_per_actor = self._gpus_per_actor(n_actors)
        return _ActorPlan(n_actors, threads_per_actor, gpus_per_actor)

    def _gpus_per_actor(self, n_actors: int) -> float | None:
        """Return GPUs per actor: 1, or 1/n if n actors share a GPU, or None without GPUs."""
        resources = self._ray.cluster_resources()
        n_gpus = int(resources.get("GPU", 0))
        if n_gpus == 0:
            return None
        actors_per_gpu = math.ceil(n_actors / n_gpus)
        return 1 / actors_per_gpu

    @contextmanager
    def _ray_data_settings(self) -> Iterator[None]:
        """Change Ray Data's settings in the block."""
        with suppress_messages():
            context = self._data.DataContext.get_current()
        settings = {
            "enable_progress_bars": False,
            # no time limit, because a part may take hours
            "execution_no_progress_timeout_s": -1,
            # several deaths are allowed, because actors may die while a machine starts
            "max_consecutive_actor_init_deaths": 5,
        }
        # a Ray version may lack some of these settings
        existing_settings = {
            name: value for name, value in settings.items() if hasattr(context, name)
        }
        with temporarily_set(context, **existing_settings), _log_only_errors("ray.data"):
            yield


@contextmanager
def _log_only_errors(library: str) -> Iterator[None]:
    """Drop a library's log lines below ERROR in the block, also from the library's threads."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True)
class _ActorPlan:
    """Number of actors, and threads and GPUs per actor."""

    n_actors: int
    threads_per_actor: int
    gpus_per_actor: float | None  # 1/n if n actors share a GPU, None if there are no GPUs


class _Actor:
    """An object that does parts in a Ray worker process."""

    def __init__(self, payload: bytes) -> None:
        self._worker = Worker(payload)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do the part in the batch, and return a batch with the outcome."""
        (part_number,) = batch["part"]
        outcome = self._worker.do_part(int(part_number))
        return {"outcome": np.array([outcome], dtype=object)}


# If vilu started Spark, Spark ends the run after this number of failures in one task. The number is
# larger than a job's ``MAX_ATTEMPTS``, so that the job gives up a crashing part first.
MAX_FAILURES = 6
# Environment variable from ``spark-submit``. If the variable is set, Spark has settings already.
SPARK_SUBMIT_VARIABLE = "PYSPARK_GATEWAY_PORT"
POLL_SECONDS = 0.05  # time between checks for new receipts
_worker_of_job: dict[str, Worker] = {}  # job hash -> the only worker in this Python process


class SparkExecutor:
    """An executor that does each part in a Spark task.

    Each Python worker process keeps the job and loads the model once. An active ``SparkContext``,
    or the context from ``spark-submit``, is used and left running. Otherwise, Spark is started on
    this machine and stopped at the end. Spark may do a part twice (retry, speculation). The part is
    still stored once, because the files have fixed names. Receipts are sent through an accumulator,
    which Spark updates once per part, when the part's task has succeeded.
    """

    name = "spark"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes) or n_cores()
        self._spark = import_extra("pyspark", "spark")

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """Yield the receipt of each part as soon as the part is done."""
        if not parts:
            return
        with self._context() as (context, n_threads):
            payload = pack_job(job, n_threads)
            broadcast = context.broadcast(payload)
            outcomes = context.accumulator([], _OutcomeLists())
            job_hash = bytes_hash(payload)
            task = partial(_run_task, broadcast, job_hash, outcomes)
            # a single part in each partition, so that each part is a separate task
            part_numbers = context.parallelize(list(parts), numSlices=len(parts))
            tasks = part_numbers.map(task)
            spark_job = _SparkJob(self._spark, context, tasks)
            try:
                n_taken_outcomes = 0
                # The last receipts may arrive just before the job ends. So after the job's end, the
                # loop goes on until all receipts are taken.
                while spark_job.is_running_after_poll() or n_taken_outcomes < len(outcomes.value):
                    new_outcomes = outcomes.value[n_taken_outcomes:]
                    for outcome in new_outcomes:
                        n_taken_outcomes += 1
                        yield unpack_receipt(outcome)
                spark_job.check(n_taken_outcomes, len(parts))
            finally:
                spark_job.cancel()
                broadcast.unpersist()

    @contextmanager
    def _context(self) -> Iterator[tuple[Any, int]]:
        """Yield a Spark context and the number of threads per task.

        The context is the active context, or a new context for the block. A new context is stopped
        at the end of the block.
        """
        active_context = self._spark.SparkContext._active_spark_context
        if active_context is None and SPARK_SUBMIT_VARIABLE in os.environ:
            active_context = self._spark.SparkContext.getOrCreate()
        if active_context is not None:
            settings = active_context.getConf()
            yield active_context, int(settings.get("spark.task.cpus", "1"))
            return
        context = self._start_spark()
        try:
            yield context, threads_per_process(self.processes)
        finally:
            context.stop()

    def _start_spark(self) -> Any:  # noqa: ANN401 - PySpark's
        """Start Spark on this machine, and return the context."""
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
        context.pythonExec = sys.executable  # workers use the same Python environment
        return context


class _SparkJob:
    """A Spark job with all tasks.

    The job starts at once, in a separate thread, so receipts can be read while it is running.

    Args:
        spark: The module ``pyspark``.
        context: The Spark context.
        tasks: The RDD with one task per part.
    """

    def __init__(self, spark: Any, context: Any, tasks: Any) -> None:  # noqa: ANN401 - of PySpark
        self._context = context
        self._job_group = f"vilu-{secrets.token_hex(4)}"
        self._error: Exception | None = None
        self._tasks = tasks
        self._thread = spark.InheritableThread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        """Run all tasks. This is the function of the thread."""
        try:
            self._context.setJobGroup(self._job_group, "vilu")
            self._tasks.collect()
        # Any exception is caught, because the job runs the user's model and reader. An uncaught
        # exception in this thread would only be printed. check() raises the exception in the main
        # thread.
        except Exception as error:  # noqa: BLE001
            self._error = error

    def is_running_after_poll(self) -> bool:
        """Wait for ``POLL_SECONDS`` or until the end. Return whether the job is still running."""
        self._thread.join(POLL_SECONDS)
        return bool(self._thread.is_alive())

    def check(self, n_receipts: int, n_parts: int) -> None:
        """Raise StorageError if the job failed, or if there are not ``n_parts`` receipts."""
        if self._error is not None:
            reason = _spark_error_line(self._error)
            raise StorageError(f"Spark gave up: {reason} Finished parts are kept.") from self._error
        if n_receipts != n_parts:
            raise StorageError(
                f"Spark ended with {n_receipts} receipts for {n_parts} parts. Finished parts are "
                "kept."
            )

    def cancel(self) -> None:
        """Stop the job if it is still running."""
        if self._thread.is_alive():
            self._context.cancelJobGroup(self._job_group)
            self._thread.join()


class _OutcomeLists:
    """Rule for joining outcome lists (an ``AccumulatorParam`` for PySpark)."""

    def zero(self, _: list[bytes]) -> list[bytes]:
        """Return the start value for each task: an empty list."""
        return []

    def addInPlace(  # noqa: N802 - PySpark's name
        self, outcomes: list[bytes], new_outcomes: list[bytes]
    ) -> list[bytes]:
        """Append the outcomes in ``new_outcomes``, and return the whole list."""
        outcomes += new_outcomes
        return outcomes


def _spark_error_line(error: Exception) -> str:
    """Return the line with the error name, from a message with a Java stack trace."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    for line in lines:
        if "SparkException" in line:
            return line
    return lines[0]


def _run_task(
    broadcast: Any,  # noqa: ANN401 - PySpark's
    job_hash: str,
    outcomes: Any,  # noqa: ANN401 - PySpark's
    part_number: int,
) -> None:
    """Do a part in a Spark Python worker.

    Args:
        broadcast: Broadcast variable with the packed job.
        job_hash: Hash of the packed job.
        outcomes: Accumulator for the part's outcome.
        part_number: Number of the part.
    """
    from pyspark import TaskContext

    if job_hash not in _worker_of_job:
        context = TaskContext.get()
        gpu_resource = context.resources().get("gpu") if context else None
        if gpu_resource:
            take_gpu(int(gpu_resource.addresses[0]))
        _worker_of_job.clear()
        _worker_of_job[job_hash] = Worker(broadcast.value)
        # PySpark collects garbage after every task. With torch imported, this would take 0.2 s.
        # Garbage collection skips frozen objects.
        gc.freeze()
    outcome = _worker_of_job[job_hash].do_part(part_number)
    outcomes.add([outcome])
