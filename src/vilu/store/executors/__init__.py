"""Where parts are done: processes here, a Ray or Spark cluster, or ranks that others started."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vilu.errors import UsageError
from vilu.validation import require_one_of

if TYPE_CHECKING:
    from vilu.store.job import Executor


EXECUTORS = ("local", "ray", "spark", "rank")

__all__ = ["EXECUTORS", "make_executor"]


def make_executor(name: str, processes: int | None = None) -> Executor:
    """The executor of a name: "local" (processes of this machine), "ray", "spark", or "rank".

    "rank": this is one of several processes that torchrun or Slurm started. By default there is a
    worker per core of this machine, or as many as the cluster has room for.
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
