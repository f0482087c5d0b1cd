"""Executors: do a job's parts in local processes, on a cluster, or by rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vilu.errors import UsageError
from vilu.validation import require_one_of

if TYPE_CHECKING:
    from vilu.store.job import Executor


EXECUTORS = ("local", "ray", "spark", "rank")

__all__ = ["EXECUTORS", "make_executor"]


def make_executor(name: str, processes: int | None = None) -> Executor:
    """Make an executor.

    Args:
        name: "local" (processes on this machine), "ray", "spark", or "rank" (this process is one of
            several processes started by torchrun or Slurm).
        processes: Number of workers. The default is this machine's core count, or on a Ray cluster
            the number of workers that fit. For "rank", ``processes`` must be None.
    """
    require_one_of("executor", name, EXECUTORS)
    if name in {"ray", "spark"}:
        from vilu.store.executors.clusters import RayExecutor, SparkExecutor

        if name == "ray":
            return RayExecutor(processes)
        return SparkExecutor(processes)
    from vilu.store.executors.local import LocalExecutor, RankExecutor

    if name == "local":
        return LocalExecutor(processes)
    if processes is not None:
        raise UsageError(
            "the rank executor takes no number of processes: whoever starts the ranks says how "
            "many."
        )
    return RankExecutor()
