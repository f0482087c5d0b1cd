"""Actors of a Ray cluster, or of a Ray of our own on this machine."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from vilu.backbones.loading import import_extra, quiet
from vilu.executors.base import Worker, check_processes, cores, pack_job, receipt_of, threads_per_process
from vilu.store.job import EmbedJob
from vilu.store.manifest import Receipt

STORE_BYTES = 2**28
"""Shared memory of a Ray of our own: only part numbers, receipts and the job go through it; Ray spills the rest."""


class RayExecutor:
    """Ray Data over part numbers: each actor holds the job, so the model is loaded once per actor.

    A Ray that runs already, in this process or at ``RAY_ADDRESS``, is used and left running; otherwise one is started
    on this machine and shut down at the end. Exactly-once comes from the parts' files, not from Ray: an actor that dies
    is restarted and its part done again. Nothing here counts deaths, the job sets aside a part that keeps crashing.

    Args:
        processes: Number of actors; by default one per core of this machine, or on a cluster one per GPU, or per core
            where it has none.

    Raises:
        UsageError: If there is no process.
        MissingModelError: If Ray is not installed.
    """

    name = "ray"

    def __init__(self, processes: int | None = None) -> None:
        self.processes = check_processes(processes)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported
        self._ray = import_extra("ray", "ray")
        self._data = import_extra("ray.data", "ray")

    def run(self, job: EmbedJob, parts: Sequence[int]) -> Iterator[Receipt]:
        """The receipts, as parts are done.

        Raises:
            Exception: What a part raised.
        """
        if not parts:
            return
        with self._cluster() as actors, self._settings(), closing(self._rows(job, parts, actors)) as rows:
            while True:
                with quiet():  # not around the yield: the driver has things to say
                    row = next(rows, None)
                if row is None:
                    return
                yield receipt_of(row["outcome"])

    def _rows(self, job: EmbedJob, parts: Sequence[int], actors: _Actors) -> Generator[dict[str, Any], None, None]:
        """A row per part, as Ray hands them out. Closing it ends Ray's threads, which must not outlive a shutdown."""
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
        address, processes = os.environ.get("RAY_ADDRESS"), self.processes or cores()
        here = {"num_cpus": max(processes, cores()), "include_dashboard": False, "object_store_memory": STORE_BYTES}
        start = {"address": address} if address else {"address": "local", **here}
        with quiet():
            self._ray.init(**start, log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield (
                self._actors() if address else _Actors(processes, threads_per_process(processes), self._gpus(processes))
            )
        finally:
            self._ray.shutdown()

    def _actors(self) -> _Actors:
        """As many as fit, each with an equal share of its machine; on the machines with GPUs only, if there are any."""
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        kind = "GPU" if any(machine.get("GPU") for machine in machines) else "CPU"
        machines = [machine for machine in machines if machine.get(kind)]
        number = self.processes or max(1, int(sum(machine[kind] for machine in machines)))
        each = math.ceil(number / max(1, len(machines)))
        threads = max(1, int(min((machine.get("CPU", 1) for machine in machines), default=1)) // each)
        return _Actors(number, threads, self._gpus(number))

    def _gpus(self, actors: int) -> float | None:
        """GPUs per actor: one; where there are fewer than actors, several share one evenly; None without."""
        gpus = int(self._ray.cluster_resources().get("GPU", 0))
        return 1 / math.ceil(actors / gpus) if gpus else None

    @contextmanager
    def _settings(self) -> Iterator[None]:
        """Quiet, and patient: a part may take hours, and actors may die while a machine starts."""
        with quiet():
            context = self._data.DataContext.get_current()
        ours = {
            "enable_progress_bars": False,
            "execution_no_progress_timeout_s": -1,
            "max_consecutive_actor_init_deaths": 5,
        }
        before = {name: getattr(context, name) for name in ours if hasattr(context, name)}
        try:
            for name in before:
                setattr(context, name, ours[name])
            yield
        finally:
            for name, value in before.items():
                setattr(context, name, value)


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
